-- wrk's script: each request carries a key that was never sent before, and waits for its turn; at the end one line says what happened.
local threads = {}
function setup(thread)
	thread:set("number", #threads)
	threads[#threads + 1] = thread
end

local file, milliseconds = nil, 0
refused, unavailable, other = 0, 0, 0
function init(args)
	file = io.open(args[1] .. number)
	milliseconds = tonumber(args[2])
end

function request()
	return wrk.format("GET", "/v1/memories", {Authorization = "Bearer " .. file:read()})
end

function delay()
	return math.random(0, 2 * milliseconds)
end

function response(status)
	if status == 401 then
		refused = refused + 1
	elseif status == 503 then
		unavailable = unavailable + 1
	else
		other = other + 1
	end
end

function done()
	local sums = {refused = 0, unavailable = 0, other = 0}
	for _, thread in ipairs(threads) do
		for name in pairs(sums) do
			sums[name] = sums[name] + thread:get(name)
		end
	end
	print(string.format("RESULT %d %d %d", sums.refused, sums.unavailable, sums.other))
end
