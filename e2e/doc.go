// Package e2e holds the tests of the whole system: clients, nginx, routers,
// backends and the Kubernetes API, against the cluster of the current
// kubeconfig context, where it was deployed with `make deploy`, or with
// `make deploy DEPLOY_WITH=tls-in-router`. Then there is no nginx, and "nginx" in the
// tests stands for the router that clients get to: few tests differ (hasNginx). With
// DEPLOY_WITH=no-tls clients come without TLS; that is for the tests of the hand-off, to
// measure what handshakes of TLS would hide on a small machine.
//
// The code is in test files, except the servers that tests start. The tests run one after
// the other. Each test restores what it changes: the overrides, the Secret, the pods. The
// names of the tests' namespaces begin with "e2e-". A precondition that is not met is a
// failure that says what to do; only programs that are not installed are a reason to skip. To
// omit a test, use -skip.
//
// The tests of closing (TestClosing...) need no cluster: they run the router as a
// process. So do TestAppsLayouts and TestMonitoringAlone. TestMonitoring and
// TestMonitoringAlone start a Prometheus of their own; where that is not installed, they say
// so and are skipped.
//
// TestDocuments types the commands of docs/install.md, README.md and docs/operations.md, in
// Kubernetes namespaces of its own, and compares what they print.
//
// TestApps and TestAppsLayouts play applications of npm, with Node.js 20 or newer. They
// install them in apps/node_modules, which "make modules" does before on a machine where
// the tests have no network. TestApps builds an image with buildah. Where one of these
// programs is not installed, they say so and are skipped.
//
// Environment:
//
//	E2E_ADDR         host:port of nginx. Default: the address of the
//	                 LoadBalancer Service "router" if it answers, else its
//	                 cluster IP, else its port of a node, else a port-forward
//	                 to a router pod. "forward" chooses that. It does not work for
//	                 TestOverrideLatency and the tests with thousands of
//	                 connections
//	E2E_ARTIFACTS    the directory for the screenshots (artifacts)
//	E2E_CONNECTIONS  how many connections TestHold5000, TestMove5000 and
//	                 TestRolloutClosesClean hold (5000)
//	E2E_HOLD         for how long (2m)
//	E2E_CLIENTS      how many clients TestScale has (300)
//	E2E_CHANGES      how many changes TestOverrideLatency makes of each size (20)
//	E2E_ANSWERS      how many sessions the commands plan and count for all routers (120)
//	E2E_HANDOFF      how many sessions the tests of the hand-off move (800), which come back
//	                 at -move-rate: on two CPUs at most 100 a second do so at once
//	E2E_COUNTERS     how many clients TestHandoffPods has (400)
//	DEPLOY_WITH      the components that tests deploy with: the same as of "make deploy"
//	E2E_APPS         "alone": TestApps runs one router as a process, without a cluster
//
// The tests with the build tag "controlplane" (make faults, make soak, make soakhandoff)
// stop and kill the API server and etcd of a cluster that was made for that. They run in its
// network, as root. They need "make build" only, except for TestFaultPodReplaced,
// TestFaultEndpointsForbidden, TestFaultHandoff and TestSoakHandoff, which need "make
// deploy", and read the backends' logs in /var/log/pods.
//
//	E2E_CONTROL_PLANE  a program that does "kill", "start", "pause" and "resume"
//	                   with "apiserver", "etcd" and the other components
//	CLUSTER_STATE      its directory, with the process ids in run/ and the keys
//	                   in pki/ (/var/lib/k8s-test-cluster)
//	E2E_SOAK           how long TestSoak and TestSoakHandoff cause faults (30m)
//	E2E_SEED           the seed of its random faults. Default: another each time
package e2e
