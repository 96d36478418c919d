package caddymodule

import (
	"encoding/json"
	"testing"
)

// TestHandlerThatIsNotKnownToDoWithoutMayAskForTheOriginalRequest: what it is told else would be a target that was not decided on.
func TestHandlerThatIsNotKnownToDoWithoutMayAskForTheOriginalRequest(t *testing.T) {
	for config, want := range map[string]bool{
		`{"handler": "static_response"}`:                                                                      false,
		`{"handler": "reverse_proxy", "transport": {"protocol": "rekall"}}`:                                   false,
		`{"handler": "reverse_proxy", "transport": {"protocol": "fastcgi"}}`:                                  true,
		`{"handler": "reverse_proxy"}`:                                                                        true,
		`{"handler": "somebody's"}`:                                                                           true,
		`{"handler": "subroute", "routes": [{"handle": [{"handler": "headers"}, {"handler": "encode"}]}]}`:    false,
		`{"handler": "subroute", "routes": [{"handle": [{"handler": "headers"}, {"handler": "templates"}]}]}`: true,
		`{"handler": "reverse_proxy", "transport": {"protocol": "rekall"}, "handle_response": [{"routes": [{"handle": [{"handler": "x"}]}]}]}`: true,
	} {
		var decoded any
		if err := json.Unmarshal([]byte(config), &decoded); err != nil {
			t.Fatal(err)
		}
		if got := mayAskOrigin(decoded); got != want {
			t.Errorf("%s: %v, want %v", config, got, want)
		}
	}
}
