#!/bin/bash
# pki.sh DIR NODE_NAME NODE_IP SERVICE_IP: the cluster's certificates and kubeconfigs, made anew at each start.
set -eu
DIR=$1 NODE=$2 NODE_IP=$3 SERVICE_IP=$4
mkdir -p "$DIR"
cd "$DIR"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1" 2>/dev/null; }

leaf() { # name, subject, extended key usage, subject alternative names if any
  key "$1.key"
  { echo "keyUsage=critical,digitalSignature,keyEncipherment"
    echo "extendedKeyUsage=$3"
    [ -z "${4-}" ] || echo "subjectAltName=$4"; } > "$1.ext"
  # Serial numbers are drawn at random, so that leaves can be signed at the same time.
  openssl req -new -key "$1.key" -subj "$2" |
    openssl x509 -req -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 8)" -days 365 \
      -extfile "$1.ext" -out "$1.crt" 2>/dev/null
  rm "$1.ext"
}

kubeconfig() { # name of the certificate
  ( umask 077; cat > "$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: octavo, cluster: {server: "https://$NODE_IP:6443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: octavo, context: {cluster: octavo, user: $1}}]
current-context: octavo
YAML
  )
}

key ca.key
openssl req -x509 -new -key ca.key -subj "/CN=octavo-cluster-ca" -days 365 -out ca.crt \
  -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
key sa.key
openssl ec -in sa.key -pubout -out sa.pub 2>/dev/null
IN_CLUSTER=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
leaf apiserver "/CN=kube-apiserver" serverAuth "DNS:localhost,IP:127.0.0.1,IP:$SERVICE_IP,IP:$NODE_IP,$IN_CLUSTER"
leaf apiserver-kubelet-client "/O=system:masters/CN=kube-apiserver-kubelet-client" clientAuth
leaf front-proxy-client "/CN=front-proxy-client" clientAuth
leaf kubelet-server "/CN=$NODE" serverAuth "DNS:$NODE,IP:127.0.0.1,IP:$NODE_IP"
leaf admin "/O=system:masters/CN=admin" clientAuth
leaf controller-manager "/CN=system:kube-controller-manager" clientAuth
leaf scheduler "/CN=system:kube-scheduler" clientAuth
leaf kube-proxy "/CN=system:kube-proxy" clientAuth
leaf kubelet "/O=system:nodes/CN=system:node:$NODE" clientAuth
for name in admin controller-manager scheduler kube-proxy kubelet; do kubeconfig $name; done
