#!/bin/bash
# A Slurm of one node on this machine, for tests: slurm.sh start DIR; slurm.sh stop DIR. DIR must be short, for its sockets.
# Needs root and Debian's packages: apt-get install --no-install-recommends slurm-wlm munge
# Use it with SLURM_CONF=DIR/slurm.conf and PATH=DIR/bin:$PATH, where a sacct stands in for the missing accounting:
# without one submitit would wait for ever for a job that died.
set -e
action=$1 D=$2

export SLURM_CONF=$D/slurm.conf

if [ "$action" = stop ]; then
  scancel --partition=debug || true
  for _ in $(seq 60); do
    [ -n "$(squeue --noheader)" ] || break # jobs that end, too
    sleep 0.5
  done
  for daemon in slurmd slurmctld munge/munged; do
    [ -s "$D/$daemon.pid" ] || continue
    pid=$(cat "$D/$daemon.pid")
    kill "$pid" || continue
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
  done
  exit
fi

host=$(hostname -s)
memory=$(($(free -m | awk '/^Mem/{print $2}') - 512))
mkdir -p "$D"/{ctld,d,log,munge,bin}
cat > "$D/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$D/munge/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/d
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=512
KillWait=5
MinJobAge=60
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
C
cat > "$D/bin/sacct" <<'C'
#!/bin/bash
ids=(); while [ $# -gt 0 ]; do [ "$1" = -j ] && { ids+=("$2"); shift; }; shift; done
echo "JobID|State|NodeList"
for id in "${ids[@]}"; do
  scontrol -o show job "$id" 2>/dev/null | awk '{
    delete v; for (i = 1; i <= NF; i++) { at = index($i, "="); v[substr($i, 1, at - 1)] = substr($i, at + 1) }
    id = v["JobId"]; task = v["ArrayTaskId"]
    if ("ArrayJobId" in v) id = v["ArrayJobId"] "_" (task ~ /^[0-9]+$/ ? task : "[" task "]")
    print id "|" v["JobState"] "|" v["NodeList"] }'
done
C
chmod +x "$D/bin/sacct"
dd if=/dev/urandom of="$D/munge/munge.key" bs=1024 count=1 2>/dev/null
chmod 400 "$D/munge/munge.key"
chmod 755 "$D/munge"
munged --key-file="$D/munge/munge.key" --socket="$D/munge/munge.socket" --pid-file="$D/munge/munged.pid" \
  --log-file="$D/munge/munged.log" --seed-file="$D/munge/munged.seed" --force
slurmctld -c -f "$SLURM_CONF"
slurmd -c -f "$SLURM_CONF" -N "$host"
for _ in $(seq 60); do
  [ "$(sinfo -h -o %t)" = idle ] && exit
  sleep 0.5
done
echo "the node did not become idle; see $D/log" >&2
exit 1
