package credential
import ("testing")
func TestZZ(t *testing.T){
 for _,q:=range []string{"q=a%20b%2Fc","url=https%3A%2F%2Fh.example%2Fx%3Fy%3D1","next_page=%7B%7D","zz=%zz","query=one%20and%20two%20and%20three%20and%20four&network_id=1"} {
  t.Log(q, worthCutting(q), testing.AllocsPerRun(10, func(){ cutReferer("https://h?"+q) }))
 }
}
