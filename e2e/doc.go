// Package e2e holds the tests of the whole system: clients, nginx, routers,
// backends and the Kubernetes API, against the cluster of the current
// kubeconfig context, where it was deployed with `make deploy`.
//
// All of it is in test files, and the tests run one after the other. Each puts
// back what it changes: the overrides, the Secret, the pods. The namespaces
// they use begin with "e2e-". A precondition that is not met is a failure that
// says what to do, never a skip; to leave a test out, use -skip.
//
// TestClosing and its like need no cluster: the router that they run is a process.
//
// Environment:
//
//	E2E_ADDR         host:port of nginx. Default: the address of the
//	                 LoadBalancer Service "router" if it answers, else its
//	                 cluster IP, else its port of a node, else a port-forward
//	                 to a router pod, which "forward" asks for and which does
//	                 not bear TestOverrideLatency and the tests with thousands
//	                 of connections
//	E2E_ARTIFACTS    where the screenshots go (artifacts)
//	E2E_CONNECTIONS  how many connections TestHold5000, TestMove5000 and
//	                 TestRolloutClosesClean hold (5000)
//	E2E_HOLD         for how long (2m)
//	E2E_CLIENTS      how many clients TestScale has (300)
//	E2E_CHANGES      how many changes TestOverrideLatency makes of each size (20)
//
// The tests with the build tag "controlplane" (make faults, make soak) stop and
// kill the API server and etcd of a cluster that is there for it, from within
// its network, as root. They need no more deployed than "make build", but for
// TestFaultPodReplaced and TestFaultEndpointsForbidden, which are about what
// "make deploy" deploys, and read the backends' logs in /var/log/pods.
//
//	E2E_CONTROL_PLANE  a program that does "kill", "start", "pause" and "resume"
//	                   with "apiserver", "etcd" and the other components
//	CLUSTER_STATE      its directory, with the process ids in run/ and the keys
//	                   in pki/ (/var/lib/k8s-test-cluster)
//	E2E_SOAK           how long TestSoak has faults (30m)
//	E2E_SEED           what its faults follow from. Default: another each time
package e2e
