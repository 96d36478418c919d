package devenv

// What the tests look at besides the package's API.

// Binaries returns the folder that a server would be started from.
func Binaries() (string, error) {
	folders, err := binaries()
	if err != nil {
		return "", err
	}
	return folders[0], nil
}
