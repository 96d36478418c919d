package devenv

// What the tests look at besides the package's API.
var Binaries = binaries
