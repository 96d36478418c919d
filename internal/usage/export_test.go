package usage

// What the tests call at a moment of their own, in place of Run.
var (
	Flush      = (*Counter).flush
	FlushLast  = (*Counter).flushLast
	FindSpikes = (*Counter).findSpikes
	Forget     = (*Counter).forget
)
