-- wrk's script: each request carries the next key, and what HTTP libraries send; at the end one line says what happened.
local threads = 0
function setup(thread)
	thread:set("number", threads)
	threads = threads + 1
end

local requests, at = {}, 0
function init(args)
	for key in io.lines(args[1]) do
		requests[#requests + 1] = wrk.format("GET", "/v1/memories", {
			["Authorization"] = "Bearer " .. key, ["User-Agent"] = "rekall-sdk/1.4.0", ["Accept"] = "application/json",
			["Accept-Encoding"] = "gzip, deflate", ["Connection"] = "keep-alive",
		})
	end
	at = math.floor(number * #requests / 2) % #requests
end

function request()
	at = at % #requests + 1
	return requests[at]
end

function done(summary)
	local errors = summary.errors
	print(string.format("RESULT %d %d %d %d", summary.requests, summary.duration, errors.status,
		errors.connect + errors.read + errors.write + errors.timeout))
end
