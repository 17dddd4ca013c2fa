package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
)

// This file is how what the API server says is read from a stream: an object at a
// time, each of a bounded size, and decoded once.

// cappedReader fails once limit bytes were read. Its reader moves the limit on
// with each object, so that it bounds one object and not the stream.
type cappedReader struct {
	r           io.Reader
	read, limit int64
}

func (c *cappedReader) Read(b []byte) (int, error) {
	if c.read >= c.limit {
		return 0, errTooBig
	}
	n, err := c.r.Read(b[:min(int64(len(b)), c.limit-c.read)])
	c.read += int64(n)
	return n, err
}

// decodeList reads a list to its end, of at most most bytes, one item after the
// other: thirty of 1 MiB each would take 100 MiB as one text.
func decodeList[T any](body io.Reader, most int64) (list object, items []*T, err error) {
	capped := &cappedReader{r: body, limit: maxObject}
	d := json.NewDecoder(capped)
	err = within(d, '{', func() (err error) {
		key, err := d.Token()
		switch key {
		case "kind":
			return d.Decode(&list.Kind)
		case "metadata":
			return d.Decode(&list.Metadata)
		case "items":
			return within(d, '[', func() error {
				items = append(items, new(T))
				capped.limit = min(d.InputOffset()+maxObject, most)
				return d.Decode(items[len(items)-1])
			})
		}
		return cmp.Or(err, d.Decode(new(json.RawMessage)))
	})
	if _, end := d.Token(); err == nil && end != io.EOF {
		err = fmt.Errorf("%w: more than a list", errAnswer)
	}
	return list, items, err
}

// decodeEvent reads one event of a watch, whose type comes first and says as what
// the object is decoded: at once, since to find its end and then decode it takes
// twice as long. An ERROR is an error, also the 410 of a watch, which is an event in
// a 200 (kubernetes#35068). io.EOF is the end of the stream before an event.
func decodeEvent[T any](d *json.Decoder) (event string, o *T, err error) {
	o = new(T)
	no := &status{}
	as := map[string]any{"ADDED": o, "MODIFIED": o, "DELETED": o, "ERROR": no, "BOOKMARK": new(json.RawMessage)}
	err = within(d, '{', func() error {
		key, err := d.Token()
		switch to := as[event]; {
		case key == "type":
			return d.Decode(&event)
		case key == "object" && to != nil:
			return d.Decode(to)
		}
		return cmp.Or(err, d.Decode(new(json.RawMessage)))
	})
	switch {
	case err != nil:
		return event, nil, err
	case event == "ERROR":
		return event, nil, no
	case as[event] == nil: // passed over, it would be lost for good (vector#5846)
		return event, nil, fmt.Errorf("%w: event of type %.60q", errAnswer, event)
	}
	return event, o, nil
}

// within calls each for the elements of a JSON array or the members of an
// object. null has none. io.EOF is an end before it only.
func within(d *json.Decoder, open json.Delim, each func() error) error {
	begin, err := d.Token()
	if err != nil || begin == nil {
		return err
	}
	if begin != open {
		return fmt.Errorf("%w: %v, want %v", errAnswer, begin, open)
	}
	for err == nil && d.More() {
		err = each()
	}
	if err == nil {
		_, err = d.Token()
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
