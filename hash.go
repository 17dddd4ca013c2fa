package main

// hashVersion is the version of the functions bucket and bucketPast. It is part of a
// table's stamp: two versions that hash in different ways do not compute the same owners.
const hashVersion = 1

// bucket returns the ordinal in [0, n) that the namespace hashes to. n must be
// at least 1.
//
// It is jump consistent hash (Lamping and Veach, "A Fast, Minimal Memory,
// Consistent Hash Algorithm", 2014) over a mixed FNV-1a. The ordinals of a
// StatefulSet fit jump hash: they are added and removed only at the end. From n to
// n+1 it moves 1/(n+1) of the namespaces, all of them to the new backend.
//
// The result is the same on every router in every version. A change here moves
// tenants and needs another hashVersion; testdata/owners.txt detects it.
func bucket(namespace string, n int) int { return jump(hash64(namespace), n) }

// hash64 returns the 64-bit hash of a namespace. All its bits are equally random.
func hash64[S string | []byte](namespace S) uint64 { return fmix64(fnv1a(namespace)) }

// jump is bucket for a namespace whose hash64 is key.
func jump(key uint64, n int) int {
	b, next := int64(-1), int64(0)
	for next < int64(n) {
		b = next
		key, next = nextJump(key, b)
	}
	return int(b)
}

// nextJump returns the bucket to which a namespace in bucket b jumps next, as n grows. It
// jumps when n grows from next to next+1. For the jump from bucket 0, key is the namespace's
// hash64. For each further jump it is the nextKey of the jump before.
func nextJump(key uint64, b int64) (nextKey uint64, next int64) {
	key = key*2862933555777941757 + 1
	return key, int64(float64(b+1) * (float64(1<<31) / float64((key>>33)+1)))
}

// bucketPast returns the bucket in [0, len(cordoned)) of a namespace whose hash64 is hash,
// when those that are true in cordoned take none. One at least must be false.
//
// Each namespace has all buckets in an order of its own, and its bucket is the first one
// that is not cordoned. The order is made from bucket 0 on: each further bucket is put
// among those before it. If the namespace jumps to the bucket, it is the first one;
// else the hash chooses one of the other ranks, evenly. So without a cordon the bucket
// is that of jump. The order of the first n buckets does not depend on later ones, nor on
// what is cordoned. From this follows, with or without a cordon:
//
//   - one bucket more is cordoned: only its namespaces move, evenly to the others;
//   - one less is: exactly these move back;
//   - from n to n+1 buckets, namespaces move to the new one only, and none if the new one
//     is cordoned. So if the last bucket is cordoned, nothing moves when it goes.
//
// Its result never changes, as that of bucket: testdata/owners-cordoned.txt.
func bucketPast(hash uint64, cordoned []bool) int {
	best, rank := 0, len(cordoned) // of best, in that order; at first it is after all
	jumpKey, next := hash, int64(0)
	for b := range cordoned {
		at := 0
		if int64(b) == next {
			jumpKey, next = nextJump(jumpKey, next)
		} else {
			random := fmix64(hash + uint64(b)*0x9e3779b97f4a7c15) // 2^64 / the golden ratio
			at = 1 + int((random>>32)*uint64(b)>>32)              // 1 to b
		}
		switch {
		case at > rank:
		case cordoned[b]:
			rank++
		default:
			best, rank = b, at
		}
	}
	return best
}

// fnv1a returns the 64-bit FNV-1a hash (draft-eastlake-fnv). hash/fnv returns the same
// value, but needs an interface, a conversion to bytes and an allocation.
func fnv1a[S string | []byte](s S) uint64 {
	h := uint64(14695981039346656037)
	for i := 0; i < len(s); i++ {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// fmix64 is the finaliser of MurmurHash3: every bit of the input reaches every
// bit of the output. FNV-1a alone gives similar hashes to names that differ only in
// their last digit.
func fmix64(k uint64) uint64 {
	k ^= k >> 33
	k *= 0xff51afd7ed558ccd
	k ^= k >> 33
	k *= 0xc4ceb9fe1a85ec53
	k ^= k >> 33
	return k
}
