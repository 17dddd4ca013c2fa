# CI runs the same targets as people do; "make help" lists them.

# the images are REGISTRY/router:TAG and REGISTRY/router-backend:TAG (k8s/image.sh)
export REGISTRY ?= localhost:5000
FUZZTIME    ?= 10s
CHURN       ?= 30m
SOAK        ?= 30m
E2E_FLAGS   ?=
# a checkout of tlsfuzzer; see e2e/tlsfuzz.sh
TLSFUZZER   ?= ../tlsfuzzer
# no: the nodes pull the image from a registry (make push)
LOAD        ?= yes
# of k8s/components, for "make deploy" and "make e2e", such as tls-in-router
export DEPLOY_WITH ?=
ROUNDS      ?= 3
# flags of bin/bench (-h), such as -d 2s -n 1000 -scenarios tls, or
# -before PATH with the path of an older router
BENCH_FLAGS ?=
ACTIONLINT  ?= github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: help build demo test modules apps monitoring tlsfuzz churn handoff fuzz bench benchcheck benchparts lint image release push load deploy undeploy e2e faults soak soakhandoff certs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

build: ## build the two static programs, bin/router and bin/backend
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/router .
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/backend ./backend

demo: build ## run four backends, the router and the demo page on this machine
	@backend/demo.sh

test: ## run the tests that need no cluster, with the race detector
	go vet ./...
	cd e2e && go vet -tags controlplane ./...
	cd bench && go vet ./... && go test -race -count=1 ./...
	go test -race -count=1 -timeout 20m ./...
	go test -race -count=1 -timeout 20m -tags portable .

churn: ## open and close sessions for CHURN, then check that nothing is left of them
	go test -count=1 -v -timeout 0 -run '^TestProxyChurn$$' . -churn $(CHURN)

handoff: ## prove that no namespace has two owners while owners change, at the whole size
	go test -count=1 -v -timeout 0 -parallel 2 -run '^TestHandoff' . -whole

fuzz: ## run each fuzz target for FUZZTIME
	@for target in $$(grep -ho '^func Fuzz[A-Za-z]*' *_test.go | cut -d' ' -f2); do \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x . || exit 1; done

tlsfuzz: build ## run tlsfuzzer's tests of TLS servers, which are in TLSFUZZER, against the router
	e2e/tlsfuzz.sh $(TLSFUZZER)

bench: build ## measure the router beside nginx and HAProxy (ROUNDS, BENCH_FLAGS)
	cd bench && CGO_ENABLED=0 go build -trimpath -o ../bin/bench . && CGO_ENABLED=0 go build -trimpath -o ../bin/bare ./peers/bare
	bench/run.sh -rounds $(ROUNDS) $(BENCH_FLAGS)

benchcheck: ## check that the comparison works: routing through each proxy, with TLS too, no figures
	$(MAKE) bench ROUNDS=1 BENCH_FLAGS='-scenarios checks -calm 0s -out bin/benchcheck'

benchparts: ## run Go's benchmarks of the parts
	go test -run '^$$' -bench . -benchmem .

lint: ## run gofmt, vet, staticcheck, actionlint, and shellcheck if it is installed
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	GOOS=darwin go vet .
	GOARCH=386 go build -o /dev/null .
	go run $(STATICCHECK) ./...
	cd e2e && go vet -tags controlplane ./... && go run $(STATICCHECK) -tags controlplane ./...
	cd bench && go vet ./... && go run $(STATICCHECK) ./...
	go run $(ACTIONLINT)
	@if command -v shellcheck; then shellcheck k8s/*.sh nginx/*.sh certs/*.sh backend/*.sh bench/*.sh e2e/apps/*.sh .ci/run; fi

# also where make runs on another system
image: export GOOS = linux
image: build ## build both images, with docker, podman or buildah
	k8s/image.sh build

release: ## make in dist/ what a release has, except for its images: archives, install.yaml, notes, checksums
	k8s/release.sh programs
	k8s/release.sh files

push: image ## push both images to REGISTRY (localhost:5000)
	k8s/image.sh push

load: image ## load both images into the cluster of the current kubeconfig context
	k8s/image.sh load

deploy: $(if $(filter no,$(LOAD)),,load) ## deploy everything to the cluster of the current kubeconfig context
	k8s/deploy.sh

undeploy: ## remove everything, except for overrides and certificate
	k8s/deploy.sh undeploy

e2e: deploy ## deploy, then the end-to-end tests
	cd e2e && go test -count=1 -v -timeout 50m $(E2E_FLAGS) .
	$(if $(E2E_CONTROL_PLANE),$(MAKE) faults)

modules: ## install the applications of e2e/apps, with npm
	cd e2e/apps && npm ci --ignore-scripts --no-audit --no-fund && cp package-lock.json node_modules/.installed-lock.json

apps: modules ## play these applications with a router alone, without a cluster
	cd e2e && E2E_APPS=alone go test -count=1 -v -timeout 10m -run '^TestApps' $(E2E_FLAGS) .

monitoring: ## fire the alerts, and see that the dashboard has data, with Prometheus and a router alone
	go test -count=1 -v -run '^TestMonitoring' ./k8s
	cd e2e && go test -count=1 -v -run '^TestMonitoringAl(one|erts)$$' .

faults: build ## test faults of a test cluster's control plane; E2E_CONTROL_PLANE stops and starts it
	cd e2e && go test -count=1 -v -timeout 20m -tags controlplane -run '^TestFault' $(E2E_FLAGS) .

soak: build ## test such faults, with clients all the time, one after the other for SOAK
	cd e2e && E2E_SOAK=$(SOAK) go test -count=1 -v -timeout 0 -tags controlplane -run '^TestSoak$$' $(E2E_FLAGS) .

soakhandoff: build ## the same for the hand-off of the routers that "make deploy" has deployed
	cd e2e && E2E_SOAK=$(SOAK) go test -count=1 -v -timeout 0 -tags controlplane -run '^TestSoakHandoff$$' $(E2E_FLAGS) .

certs: ## make a root CA and a certificate for mydomain.com, in certs/
	certs/make.sh

clean: ## remove what was built
	rm -rf bin dist e2e/artifacts bench/results
