package apikey

// ErrMalformed is what Parse returns of what is no key.
var ErrMalformed = errMalformed
