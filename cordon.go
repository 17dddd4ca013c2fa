package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// cordonAnnotation is the annotation of the StatefulSet that lists the cordoned backends,
// as parseCordon takes it.
const cordonAnnotation = "router-cordon"

// cordon has the ordinals of the backends that are cordoned, sorted: the hash gives them
// no namespaces. Overrides still do. It is immutable, and a flag.
type cordon []int

// parseCordon parses a list of ordinals, like "2,5". They may be in any order; one that
// is repeated counts once. "" has none.
func parseCordon(list string) (cordon, error) {
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	var c cordon
	for _, digits := range splitList(list) {
		n, ok := parseDecimal(digits, 31)
		if !ok {
			return nil, fmt.Errorf("not a list of ordinals like 2,5 (got %.60q)", list)
		}
		c = append(c, int(n))
	}
	return newCordon(c), nil
}

// newCordon returns the cordon of these ordinals, which may be in any order.
func newCordon(ordinals []int) cordon {
	sorted := slices.Clone(ordinals)
	slices.Sort(sorted)
	return slices.Compact(sorted)
}

// String returns the list as parseCordon takes it.
func (c cordon) String() string { return joined(c, ",", strconv.Itoa) }

// Set makes the list the flag's value.
func (c *cordon) Set(list string) (err error) {
	*c, err = parseCordon(list)
	return err
}

// maxCordonBytes bounds the JSON of a list. All annotations of an object have at most
// 256 KiB together
// (https://kubernetes.io/docs/concepts/overview/working-with-objects/annotations/).
const maxCordonBytes = 256 << 10

// UnmarshalJSON reads an array of ordinals.
func (c *cordon) UnmarshalJSON(b []byte) error {
	if len(b) > maxCordonBytes {
		return fmt.Errorf("cordon must have at most %d bytes (got %d)", maxCordonBytes, len(b))
	}
	var ordinals []int
	if err := json.Unmarshal(b, &ordinals); err != nil {
		return err
	}
	*c = newCordon(ordinals)
	if len(*c) > 0 && (*c)[0] < 0 {
		return fmt.Errorf("cordon must have ordinals (got %d)", (*c)[0])
	}
	return nil
}

// among returns the part of c that these backends have. It returns none, and true, if
// that would be all of them: then no cordon is in force. It depends on nothing else, so
// that all routers agree.
func (c cordon) among(backends ordinalRange) (part cordon, all bool) {
	for _, ordinal := range c {
		if backends.has(ordinal) {
			part = append(part, ordinal)
		}
	}
	if len(part) > 0 && len(part) == backends.count {
		return nil, true
	}
	return part, false
}
