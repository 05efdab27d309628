# Read by common.sh where a launcher runs a process for each GPU: the environment's NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT, GPUS_PER_NODE, NPROC and MAX_RESTARTS, and torchrun with them.

# The value of a variable must be a whole number between two others: NAME VALUE LEAST MOST
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
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$hosts needs MASTER_ADDR: the name or address of host 0"
        [ -n "${NODE_RANK:-}" ] || fail "NNODES=$hosts needs NODE_RANK: which host this is, from 0"
    fi
    host=${NODE_RANK:-0}
    check_number NODE_RANK "$host" 0 $((hosts - 1))
    # The default of one host is that the system chooses.
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
' "$port" 2>/dev/null || fail "MASTER_PORT=$port cannot be listened on: another program may. Give another port"
    fi
}

# This host's address on the way to host 0, and the network interface that has it.
find_address() {
    "$python" -c '
import socket, struct, sys

way = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(way[0], socket.SOCK_DGRAM) as probe:
    probe.connect(way[4])  # sends nothing
    address = probe.getsockname()[0]
    print(address)
    for _, name in socket.if_nameindex() if way[0] == socket.AF_INET and sys.platform == "linux" else ():
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

# torchrun in place of this shell, with the arguments of finetune.py.
run_many() {
    count=${GPUS_PER_NODE:-$gpus}
    [ "$count" -gt 0 ] || count=${NPROC:-1}
    if [ "$gpus" -gt 0 ] && [ "$count" -gt "$gpus" ]; then
        fail "GPUS_PER_NODE=$count: this host has $gpus visible GPUs"
    fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$((cores / count > 1 ? cores / count : 1))
        export OMP_NUM_THREADS
    fi
    # torchrun's store outlives the processes that it starts again; in it these would find what their predecessors
    # said, their addresses among it. With this the first process of each start has a store of its own.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # torchrun's "c10d" rendezvous, because hosts that start again wait for each other only there.
    address=127.0.0.1
    endpoint=localhost:${port:-0}
    if [ "$hosts" -gt 1 ]; then
        found=$(find_address) || fail "MASTER_ADDR=$MASTER_ADDR cannot be found or reached. Give host 0's name or address"
        address=$(echo "$found" | sed -n 1p)
        interface=$(echo "$found" | sed -n 2p)
        endpoint=$MASTER_ADDR:$port
        # Without it gloo takes the address of the host's name, which often is that of the loopback.
        [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    fi
    exec "$python" -m torch.distributed.run --nnodes "$hosts" --nproc_per_node "$count" --max_restarts "$restarts" \
        --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "qwen-${port:-$$}" \
        --rdzv_conf "is_host=$([ "$host" = 0 ] && echo 1 || echo 0)" --local_addr "$address" \
        "$root/finetune.py" "$@"
}
