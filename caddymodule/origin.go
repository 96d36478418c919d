package caddymodule

import "net/http"

// mayAskOrigin reports whether a handler of a block may ask Caddy for the request as it came, as the transport "fastcgi" does for its
// REQUEST_URI: all do that are not known to do without.
func mayAskOrigin(config any) bool {
	for object := range objectsIn(config) {
		switch object["handler"] {
		case nil, "subroute", "headers", "request_body", "encode", "rewrite", "vars", "map", "error", "static_response", "log_append":
		case "reverse_proxy":
			if transport, _ := object["transport"].(map[string]any); transport["protocol"] != "rekall" {
				return true
			}
		default:
			return true
		}
	}
	return false
}

// decidedOn is what Caddy records as the original request, but as it reached the gateway. A handler before the gateway may have
// rewritten it, and a backend that routes by the earlier target would serve another request than the one decided on.
func decidedOn(r *http.Request) http.Request {
	target := *r.URL
	return http.Request{Method: r.Method, RemoteAddr: r.RemoteAddr, RequestURI: r.URL.RequestURI(), URL: &target}
}
