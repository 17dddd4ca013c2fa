package main

// hashVersion is the version of the function bucket. It is part of a table's stamp: two
// versions that hash in different ways do not compute the same owners.
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
	b, j := int64(-1), int64(0)
	for j < int64(n) {
		b = j
		key = key*2862933555777941757 + 1
		j = int64(float64(b+1) * (float64(1<<31) / float64((key>>33)+1)))
	}
	return int(b)
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
