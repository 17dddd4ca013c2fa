package main

// unpack is the reverse of pack.
func unpack(p *packed) map[string]string {
	data := map[string]string{}
	for r := range p.all() {
		data[string(r.namespace)] = p.value(r)
	}
	return data
}
