# One image with both programs: /router and, for the StatefulSet, /backend.
# `make image` builds the static binaries into bin/ first. There is no shell
# and no CA bundle inside: the router trusts the CA that Kubernetes mounts
# with its service account, and calls nothing else over TLS.
FROM scratch
ARG VERSION=dev
LABEL org.opencontainers.image.title="router" \
      org.opencontainers.image.description="WebSocket router for stateful backends on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY bin/router bin/backend /
# Sessions, the admin port, and the port of /backend.
EXPOSE 8000 8001 9000
# A number, not a name: only then can Kubernetes check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["/router"]
