# Sourced by common.sh for launchers with one process per GPU. Reads NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT,
# GPUS_PER_NODE, NPROC and MAX_RESTARTS from the environment and runs torchrun with them.

# check_number NAME VALUE MINIMUM MAXIMUM: fail unless VALUE is a whole number in this range.
check_number() {
    case $2 in
    '' | *[!0-9]* | ???????*) fail "$1=$2 is not possible. Give a whole number from $3 to $4" ;;
    esac
    if [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
        fail "$1=$2 is not possible. Give a whole number from $3 to $4"
    fi
}

check_environment() {
    hosts=${NNODES:-1}
    check_number NNODES "$hosts" 1 65536
    if [ "$hosts" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$hosts needs MASTER_ADDR: name or address of host 0"
        [ -n "${NODE_RANK:-}" ] || fail "NNODES=$hosts needs NODE_RANK: rank of this host, from 0"
    fi
    host=${NODE_RANK:-0}
    check_number NODE_RANK "$host" 0 $((hosts - 1))
    # On a single host the system chooses a free port by default.
    port=${MASTER_PORT:-$([ "$hosts" = 1 ] || echo 6001)}
    [ -z "$port" ] || check_number MASTER_PORT "$port" 1 65535
    for name in GPUS_PER_NODE NPROC; do
        eval "value=\${$name:-1}"
        check_number $name "$value" 1 1024
    done
    restarts=${MAX_RESTARTS:-0}
    check_number MAX_RESTARTS "$restarts" 0 999999
    if [ -n "$port" ] && [ "$host" = 0 ]; then
        "$python" -c '
import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("", int(sys.argv[1])))
' "$port" 2>/dev/null || fail "MASTER_PORT=$port cannot be opened: another program may use it. Give another port"
    fi
}

# Print this host's address on the route to host 0, and the network interface that has it.
find_address() {
    "$python" -c '
import socket, struct, sys

route = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(route[0], socket.SOCK_DGRAM) as probe:
    probe.connect(route[4])  # sends nothing
    address = probe.getsockname()[0]
    print(address)
    for _, name in socket.if_nameindex() if route[0] == socket.AF_INET and sys.platform == "linux" else ():
        import fcntl

        try:
            answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
        except OSError:
            continue  # it has no address
        if socket.inet_ntoa(answer[20:24]) == address:
            print(name)
            break
' "$MASTER_ADDR" "$port" 2>/dev/null
}

# Set the number of processes on this host.
count_processes() {
    count=${GPUS_PER_NODE:-$gpus}
    [ "$count" -gt 0 ] || count=${NPROC:-1}
    if [ "$gpus" -gt 0 ] && [ "$count" -gt "$gpus" ]; then
        fail "GPUS_PER_NODE=$count: this host has $gpus visible GPUs"
    fi
}

# Replace this shell by torchrun. Arguments: those of finetune.py.
run_many() {
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$((cores / count > 1 ? cores / count : 1))
        export OMP_NUM_THREADS
    fi
    # torchrun's store outlives a restart and would give the restarted processes the addresses of their predecessors.
    # With this variable rank 0 creates a new store at each start.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # torchrun would end the run when the terminal is closed, although nohup has had that signal ignored.
    if "$python" -c 'import signal; raise SystemExit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)' >/dev/null; then
        export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
    fi
    # Only in torchrun's "c10d" rendezvous do restarted hosts wait for each other.
    address=127.0.0.1
    endpoint=localhost:${port:-0}
    if [ "$hosts" -gt 1 ]; then
        found=$(find_address) || fail "MASTER_ADDR=$MASTER_ADDR cannot be resolved or reached. Give the name or address of host 0"
        address=$(echo "$found" | sed -n 1p)
        interface=$(echo "$found" | sed -n 2p)
        endpoint=$MASTER_ADDR:$port
        # By default gloo uses the address of the host name, which is often the loopback address.
        [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    fi
    exec "$python" "$root/training/distributed/torchrun.py" --nnodes "$hosts" --nproc_per_node "$count" \
        --max_restarts "$restarts" --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "qwen-${port:-$$}" \
        --rdzv_conf "is_host=$([ "$host" = 0 ] && echo 1 || echo 0)" --local_addr "$address" \
        "$root/finetune.py" "$@"
}
