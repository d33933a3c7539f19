# The first process of a cloudbox machine: makes the machine's file system, starts sshd and the user-data's script.
# Runs in fresh mount, PID, UTS and network namespaces. $1: the machine's folder; its `seed` holds what the machine is
# told. Standard input is a pipe from whoever made the machine: a line says that the network cable is in, the end of it
# that the owner is gone, and with it this machine.
set -eu
box=$1
. "$box/seed/facts"

mount -t tmpfs -o "size=$disk,mode=755" tmpfs "$box/disk"
mkdir "$box/disk/upper" "$box/disk/work" "$box/disk/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$box/disk/upper,workdir=$box/disk/work" "$box/disk/root"
cd "$box/disk/root"

# Whatever is not part of a plain system is hidden, and so are homes and scratch folders.
for entry in *; do
    case $entry in
        bin|boot|etc|lib|lib32|lib64|libx32|media|mnt|opt|sbin|srv|usr|var) ;;
        dev|proc|sys) ;;
        *) [ ! -d "$entry" ] || [ -L "$entry" ] || mount -t tmpfs -o "size=$disk,mode=755" tmpfs "$entry" ;;
    esac
done
chmod 1777 tmp
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
for node in null zero full random urandom tty fuse; do [ -e "/dev/$node" ] || continue; touch "dev/$node"; mount --bind "/dev/$node" "dev/$node"; done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
[ -z "$shared" ] || mount --bind "$shared" root
if [ -n "$baked" ]; then
    mkdir -p root/.cache/skyward "$box/disk/baked" "$box/disk/baking"
    mount -t overlay overlay -o "lowerdir=$baked,upperdir=$box/disk/baked,workdir=$box/disk/baking" root/.cache/skyward
fi
mkdir -p run/sshd run/before run/seed
cp -r "$box/seed/." run/seed/
pivot_root . run/before
cd /
umount -l /run/before

hostname "$name"
echo "$name" > /etc/hostname
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > /etc/hosts
# Masquerading may lose one of two questions to the name server that are sent at once: ask again soon, not after 5 s.
echo 'options timeout:1' >> /etc/resolv.conf
rm -rf /etc/ssh/ssh_host_* /var/log/*
for key in /run/seed/ssh_host_*_key; do
    [ -e "$key" ] && install -m 600 "$key" /etc/ssh/ || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
done
if [ "$user" != root ]; then
    echo "$user:x:4242:4242::/home/$user:/bin/sh" >> /etc/passwd
    echo "$user:x:4242:" >> /etc/group
    echo "$user:*:19000:0:99999:7:::" >> /etc/shadow
    mkdir -p "/home/$user"
fi
home=$([ "$user" = root ] && echo /root || echo "/home/$user")
chmod 700 "$home"
install -d -m 700 "$home/.ssh"
install -m 600 /run/seed/authorized_keys "$home/.ssh/authorized_keys"
[ "$user" = root ] || chown -R "$user:$user" "$home"
cat > /etc/ssh/sshd_config <<-END
	Port 22
	HostKey /etc/ssh/ssh_host_ed25519_key
	PermitRootLogin prohibit-password
	PasswordAuthentication no
	KbdInteractiveAuthentication no
	UsePAM no
	UseDNS no
	PidFile none
	MaxStartups 100
	Subsystem sftp internal-sftp
END

# Switching a machine off is ending its first process.
trap 'exit 0' TERM
for command in poweroff shutdown halt; do
    rm -f "/usr/sbin/$command"
    printf '#!/bin/sh\nkill -TERM 1\n' > "/usr/sbin/$command"
    chmod 755 "/usr/sbin/$command"
done

read -r _
ip link set lo up
echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify
ip address add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
/usr/sbin/sshd -e -E /var/log/sshd.log -f /etc/ssh/sshd_config

if [ -e /run/seed/script ]; then
    setsid sh -c 'chmod 700 /run/seed/script; exec /run/seed/script' > /var/log/cloud-init-output.log 2>&1 < /dev/null &
fi
exec 3<&0
cat <&3 > /dev/null &
wait $! || true
