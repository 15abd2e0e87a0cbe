#!/bin/bash
# First process of the cluster's own mount, network and PID namespaces: everything that it starts dies with it.
# Called by cluster.py through unshare. Environment: HERE this folder, STATE the cluster's folder, STORE containerd's
# folder, CGROUP the cgroup's name, PROGRAMS a PATH of built programs, PAUSE the pause image's archive, GPUS a number.
set -eu
NODE=node1 NODE_IP=10.250.0.1 SERVICES=10.96.0.0/16 SERVICE_IP=10.96.0.1
LOGS=$STATE/logs PKI=/etc/kubernetes/pki
export PATH=$PROGRAMS:$PATH
mkdir -p "$LOGS" "$STATE/pids"

# Mounts: the standard paths, private to this cluster. The kubelet needs shared propagation, so that comes first.
mount --make-rshared /
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock
mkdir -p "$STORE" /var/lib/containerd
mount --bind "$STORE" /var/lib/containerd
for d in /var/lib/kubelet /var/lib/cni /etc/cni/net.d /etc/kubernetes /var/log/pods /var/log/containers; do
  mkdir -p "$d" "$STATE/root$d"
  mount --bind "$STATE/root$d" "$d"
done
# The kubelet sets these sysctls for the whole machine unless they already read so: it is shown files that do.
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
  file=/run/sysctl.$(basename "${setting%=*}")
  echo "${setting#*=}" > "$file"
  mount --bind "$file" "/proc/sys/${setting%=*}"
done

# Network: lo, and an empty bridge that carries the node's address (not every kernel has the dummy device).
# Nothing outside can be reached, so nothing leaks.
ip link set lo up
ip link add node0 type bridge
ip addr add $NODE_IP/32 dev node0
ip link set node0 up
# Local connects to a ClusterIP look their route up before kube-proxy's DNAT, so the range needs one.
ip route add $SERVICES dev node0 src $NODE_IP
ip route add unreachable default
echo 1 > /proc/sys/net/ipv4/ip_forward
[ ! -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables

# cgroup v1: the kubelet's root must exist in every hierarchy, and a new cpuset starts without its two values.
for c in /sys/fs/cgroup/*/; do mkdir -p "$c/$CGROUP" 2>/dev/null || true; done
for f in cpus mems; do cat /sys/fs/cgroup/cpuset/cpuset.$f > "/sys/fs/cgroup/cpuset/$CGROUP/cpuset.$f"; done

start() { # name, command: runs beside us, logs to its own file
  local name=$1
  shift
  "$@" > "$LOGS/$name.log" 2>&1 &
  echo $! > "$STATE/pids/$name"
}

alive() { # ends the whole cluster, with the reason, when one of its programs has died
  local file
  for file in "$STATE"/pids/*; do
    kill -0 "$(cat "$file")" || { echo "$(basename "$file") has died:"; tail -n 20 "$LOGS/$(basename "$file").log"; exit 1; }
  done
}
await() { # what start.log ends with is what a cluster that does not get ready lacks
  echo "after $SECONDS s: waiting for $*"
  until "$@" > /dev/null 2>&1; do alive; sleep 0.1; done
}

cp "$HERE"/{kube-proxy.yaml,Corefile,containerd.toml} /etc/kubernetes/
start containerd containerd --config /etc/kubernetes/containerd.toml
# Nobody reads this etcd's data after a crash, so it need not wait for the disk.
start etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn

"$HERE/pki.sh" $PKI $NODE $NODE_IP $SERVICE_IP
sed "s|CGROUP_ROOT|$CGROUP|" "$HERE/kubelet.yaml" > /etc/kubernetes/kubelet.yaml
cp "$HERE/10-bridge.conflist" /etc/cni/net.d/
echo "nameserver $NODE_IP" > /etc/kubernetes/resolv.conf

start kube-apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=$NODE_IP --secure-port=6443 \
  --tls-cert-file=$PKI/apiserver.crt --tls-private-key-file=$PKI/apiserver.key --client-ca-file=$PKI/ca.crt \
  --service-account-issuer=https://kubernetes.default.svc.cluster.local \
  --service-account-key-file=$PKI/sa.pub --service-account-signing-key-file=$PKI/sa.key \
  --service-cluster-ip-range=$SERVICES --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --allow-privileged=true --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority=$PKI/ca.crt \
  --kubelet-client-certificate=$PKI/apiserver-kubelet-client.crt --kubelet-client-key=$PKI/apiserver-kubelet-client.key \
  --requestheader-client-ca-file=$PKI/ca.crt --requestheader-allowed-names=front-proxy-client \
  --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
  --requestheader-extra-headers-prefix=X-Remote-Extra- \
  --proxy-client-cert-file=$PKI/front-proxy-client.crt --proxy-client-key-file=$PKI/front-proxy-client.key

await ctr version
ctr -n k8s.io images ls -q | grep -qx localhost/pause:1 || ctr -n k8s.io images import "$PAUSE" > "$LOGS/import.log" 2>&1

export KUBECONFIG=$PKI/admin.kubeconfig
await kubectl get --raw /readyz
# By default the controller manager makes an account for each controller at 20 requests a second, which takes 5 seconds.
# And a claim that is looked at before its volume waits for the next look, 15 seconds later.
start kube-controller-manager kube-controller-manager --kubeconfig=$PKI/controller-manager.kubeconfig \
  --authentication-kubeconfig=$PKI/controller-manager.kubeconfig \
  --authorization-kubeconfig=$PKI/controller-manager.kubeconfig --bind-address=127.0.0.1 --leader-elect=false \
  --service-account-private-key-file=$PKI/sa.key --root-ca-file=$PKI/ca.crt --use-service-account-credentials=true \
  --kube-api-qps=300 --kube-api-burst=600 --pvclaimbinder-sync-period=1s
start kube-scheduler kube-scheduler --kubeconfig=$PKI/scheduler.kubeconfig \
  --authentication-kubeconfig=$PKI/scheduler.kubeconfig --authorization-kubeconfig=$PKI/scheduler.kubeconfig \
  --bind-address=127.0.0.1 --leader-elect=false
start kubelet kubelet --config=/etc/kubernetes/kubelet.yaml --kubeconfig=$PKI/kubelet.kubeconfig \
  --hostname-override=$NODE --node-ip=$NODE_IP
start kube-proxy kube-proxy --config=/etc/kubernetes/kube-proxy.yaml
start coredns coredns -conf /etc/kubernetes/Corefile
[ "${GPUS:-0}" = 0 ] || start fake-gpu fake-gpu -n "$GPUS"

node_is_ready() { [ "$(kubectl get node $NODE -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
await node_is_ready
# No pod can be made before the default service account exists, which may be after the node is Ready.
await kubectl get serviceaccount default
gpus_are_there() { [ "$(kubectl get node $NODE -o 'jsonpath={.status.allocatable.nvidia\.com/gpu}')" = "$GPUS" ]; }
[ "${GPUS:-0}" = 0 ] || await gpus_are_there
alive
touch "$STATE/ready"

trap 'exit 0' TERM INT
while :; do wait -n || true; sleep 1; done # as PID 1 it reaps whatever pods leave behind
