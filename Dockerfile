# Two images, each with one static program: the router, and with --target backend the demo
# backend. There is no shell and no CA bundle inside: the router trusts the CA that
# Kubernetes mounts with its service account, and calls nothing else over TLS.
#
# `docker build .` compiles the programs, and needs neither Go nor make. With
# --build-context programs=DIR they come from a directory instead (k8s/image.sh).

# For `router version` and the labels.
ARG VERSION=dev
ARG REVISION=unknown

# The go directive of go.mod has the same version.
FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26 AS programs
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION
ARG REVISION
ARG TARGETOS
ARG TARGETARCH
RUN echo "$VERSION $REVISION" >version.txt && \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags '-s -w' -o / . ./backend

FROM scratch AS backend
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="router-backend" \
      org.opencontainers.image.description="Demo backend of the WebSocket router" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=programs /backend /
EXPOSE 9000
# A number, not a name: only then can Kubernetes check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["/backend"]

# The last stage is what is built without --target.
FROM scratch AS router
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="router" \
      org.opencontainers.image.description="WebSocket router for stateful backends on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=programs /router /
# Clients, and the admin port.
EXPOSE 8000 8001
USER 65532:65532
ENTRYPOINT ["/router"]
