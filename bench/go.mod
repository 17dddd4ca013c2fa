module router/bench

go 1.26.0
