// Makes system calls from inside an instance, one line of text for each: its name, and "ok", the error, or the signal
// that ended it. Each runs in a process of its own. Built by the test, statically, for images without a library.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define BEGIN(name)                                \
  do {                                             \
    const char *what = name;                       \
    fflush(stdout);                                \
    pid_t child = fork();                          \
    if (child == 0) {                              \
      errno = 0;                                   \
      long result =
#define END                                        \
  ;                                                \
  said(what, result);                              \
  }                                                \
  waited(what, child);                             \
  }                                                \
  while (0)
#define CALL(name, ...) BEGIN(name) syscall(__VA_ARGS__) END
#define N(call) CALL(#call, SYS_##call, 0, 0, 0, 0, 0, 0)
#define SOCKET(text, family, type, protocol) CALL("socket " text, SYS_socket, family, type, protocol)
#define PAIR(text, family) CALL("socketpair " text, SYS_socketpair, family, SOCK_STREAM, 0, (int[2]){0, 0})
#define CLONE(text, flags) BEGIN("clone " text) cloned(flags) END

static void said(const char *what, long result) {
  printf("%-34s %s\n", what, result < 0 ? strerrorname_np(errno) : "ok");
  fflush(stdout);
  _exit(0);
}

static void waited(const char *what, pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) printf("%-34s signal %s\n", what, sigabbrev_np(WTERMSIG(status)));
}

// A child ends at once; its parent says how the call went.
static long cloned(unsigned long flags) {
  long child = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
  if (child == 0) _exit(0);
  return child;
}

static long cloned3(uint64_t flags) {
  struct clone_args args = {.flags = flags, .exit_signal = SIGCHLD};
  long child = syscall(SYS_clone3, &args, sizeof args);
  if (child == 0) _exit(0);
  return child;
}

#ifdef __x86_64__
static long by_interrupt(long number) {
  long result;
  __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(0), "c"(0), "d"(0) : "memory");
  errno = result < 0 ? (int)-result : 0;
  return result < 0 ? -1 : result;
}
#endif

static long bound(int family) {
  int fd = socket(family, SOCK_STREAM, 0);
  if (fd < 0) return fd;
  struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  return bind(fd, (struct sockaddr *)&in, sizeof in);
}

int main(void) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  // Namespaces.
  CALL("unshare NEWUSER", SYS_unshare, CLONE_NEWUSER);
  CALL("unshare NEWNET", SYS_unshare, CLONE_NEWNET);
  CALL("unshare NEWNS", SYS_unshare, CLONE_NEWNS);
  CALL("unshare NEWPID", SYS_unshare, CLONE_NEWPID);
  CALL("unshare NEWTIME", SYS_unshare, CLONE_NEWTIME);
  CALL("unshare FILES", SYS_unshare, CLONE_FILES);
  CALL("setns", SYS_setns, open("/proc/self/ns/user", O_RDONLY), CLONE_NEWUSER);
  CALL("setns pidfd", SYS_setns, syscall(SYS_pidfd_open, getpid(), 0), CLONE_NEWUSER | CLONE_NEWNET);
  CLONE("plain", 0);
  CLONE("VFORK", CLONE_VFORK);
  CLONE("NEWUSER", CLONE_NEWUSER);
  CLONE("NEWNS", CLONE_NEWNS);
  CLONE("NEWNET", CLONE_NEWNET);
  CLONE("NEWPID", CLONE_NEWPID);
  CLONE("NEWIPC", CLONE_NEWIPC);
  CLONE("NEWUTS", CLONE_NEWUTS);
  CLONE("NEWCGROUP", CLONE_NEWCGROUP);
  CLONE("NEWUSER NEWNET", CLONE_NEWUSER | CLONE_NEWNET);
  CLONE("NEWUSER, high bits set", CLONE_NEWUSER | (1UL << 40));
  BEGIN("clone3 plain") cloned3(0) END;
  BEGIN("clone3 NEWUSER") cloned3(CLONE_NEWUSER) END;
  // Mounts.
  CALL("mount tmpfs", SYS_mount, "x", "/tmp", "tmpfs", 0, "");
  CALL("mount bind", SYS_mount, "/", "/tmp", 0, 4096, 0);
  CALL("mount cgroup2", SYS_mount, "x", "/tmp", "cgroup2", 0, "");
  CALL("umount2", SYS_umount2, "/tmp", 0);
  CALL("pivot_root", SYS_pivot_root, "/tmp", "/tmp");
  CALL("chroot", SYS_chroot, "/");
  CALL("move_mount", SYS_move_mount, -1, "", -1, "/tmp", 0);
  CALL("open_tree", SYS_open_tree, AT_FDCWD, "/", 1);
  CALL("fsopen", SYS_fsopen, "tmpfs", 0);
  N(fsconfig);
  N(fsmount);
  CALL("fspick", SYS_fspick, AT_FDCWD, "/", 0);
  N(mount_setattr);
  CALL("statmount", 457, 0, 0, 0, 0);
  CALL("listmount", 458, 0, 0, 0, 0);
  // Other processes.
  CALL("ptrace TRACEME", SYS_ptrace, 0, 0, 0, 0);
  CALL("ptrace ATTACH", SYS_ptrace, 16, 1, 0, 0);
  N(process_vm_readv);
  N(process_vm_writev);
  N(process_madvise);
  N(process_mrelease);
  N(kcmp);
  CALL("pidfd_open", SYS_pidfd_open, getpid(), 0);
  N(pidfd_getfd);
  // Keys.
  CALL("keyctl", SYS_keyctl, 0, -3, 0, 0, 0);
  CALL("keyctl join", SYS_keyctl, 1, 0, 0, 0, 0);
  CALL("add_key", SYS_add_key, "user", "x", "y", 1, -2);
  CALL("request_key", SYS_request_key, "user", "x", 0, -2);
  // Large doors of the kernel.
  CALL("io_uring_setup", SYS_io_uring_setup, 1, (char[256]){0});
  N(io_uring_enter);
  N(io_uring_register);
  CALL("io_setup", SYS_io_setup, 1024, (unsigned long[1]){0});
  N(io_submit);
  N(bpf);
  CALL("userfaultfd", SYS_userfaultfd, 1);
  N(perf_event_open);
  N(fanotify_init);
  N(fanotify_mark);
  N(name_to_handle_at);
  N(open_by_handle_at);
  N(lookup_dcookie);
  N(vmsplice);
  CALL("memfd_secret", SYS_memfd_secret, 0);
  N(move_pages);
  N(migrate_pages);
  N(remap_file_pages);
#ifdef SYS_modify_ldt
  N(modify_ldt);
  N(ioperm);
  N(iopl);
  N(uselib);
  N(ustat);
#endif
  // The machine.
  N(init_module);
  N(finit_module);
  N(delete_module);
  N(kexec_load);
  N(kexec_file_load);
  N(reboot);
  N(swapon);
  N(swapoff);
  N(quotactl);
  N(quotactl_fd);
  N(acct);
  N(syslog);
  CALL("syslog, size of the log", SYS_syslog, 10, 0, 0);
  N(vhangup);
  CALL("sethostname", SYS_sethostname, "x", 1);
  CALL("setdomainname", SYS_setdomainname, "x", 1);
  N(settimeofday);
  N(clock_settime);
  CALL("adjtimex, read", SYS_adjtimex, (char[512]){0});
  N(clock_adjtime);
  N(nfsservctl);
  N(sync);
  CALL("syncfs", SYS_syncfs, open("/etc/hosts", O_RDONLY));
  // Personality.
  CALL("personality Linux", SYS_personality, 0);
  CALL("personality ask", SYS_personality, 0xffffffff);
  CALL("personality NO_RANDOMIZE", SYS_personality, 0x0040000);
  CALL("personality READ_IMPLIES_EXEC", SYS_personality, 0x0400000);
  CALL("personality, high bits set", SYS_personality, 1L << 33);
  // Sockets.
  SOCKET("UNIX stream", AF_UNIX, SOCK_STREAM, 0);
  SOCKET("UNIX datagram", AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  SOCKET("UNIX seqpacket", AF_UNIX, SOCK_SEQPACKET, 0);
  SOCKET("INET tcp", AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  SOCKET("INET tcp by number", AF_INET, SOCK_STREAM, 6);
  SOCKET("INET udp", AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 17);
  SOCKET("INET6 tcp", AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 6);
  SOCKET("INET6 udp", AF_INET6, SOCK_DGRAM, 0);
  SOCKET("INET raw icmp", AF_INET, SOCK_RAW, 1);
  SOCKET("INET raw, close on exec", AF_INET, SOCK_RAW | SOCK_CLOEXEC, 255);
  SOCKET("INET6 raw icmp", AF_INET6, SOCK_RAW, 58);
  SOCKET("INET packet", AF_INET, SOCK_PACKET, 768);
  SOCKET("INET sctp", AF_INET, SOCK_STREAM, 132);
  SOCKET("INET sctp seqpacket", AF_INET, SOCK_SEQPACKET, 132);
  SOCKET("INET dccp", AF_INET, 6, 33);
  SOCKET("INET mptcp", AF_INET, SOCK_STREAM, 262);
  SOCKET("INET6 mptcp", AF_INET6, SOCK_STREAM, 262);
  SOCKET("INET l2tp", AF_INET, SOCK_DGRAM, 115);
  SOCKET("INET udplite", AF_INET, SOCK_DGRAM, 136);
  SOCKET("NETLINK route", AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0);
  SOCKET("NETLINK nfnetlink", AF_NETLINK, SOCK_RAW, 12);
  SOCKET("NETLINK audit", AF_NETLINK, SOCK_RAW, 9);
  SOCKET("NETLINK xfrm", AF_NETLINK, SOCK_RAW, 6);
  SOCKET("NETLINK generic", AF_NETLINK, SOCK_RAW, 16);
  SOCKET("NETLINK kobject", AF_NETLINK, SOCK_RAW, 15);
  SOCKET("NETLINK diag", AF_NETLINK, SOCK_RAW, 4);
  SOCKET("UNSPEC", AF_UNSPEC, SOCK_STREAM, 0);
  SOCKET("AX25", AF_AX25, SOCK_DGRAM, 0);
  SOCKET("X25", AF_X25, SOCK_SEQPACKET, 0);
  SOCKET("PACKET", AF_PACKET, SOCK_RAW, 768);
  SOCKET("KEY", AF_KEY, SOCK_RAW, 2);
  SOCKET("RDS", AF_RDS, SOCK_SEQPACKET, 0);
  SOCKET("CAN", AF_CAN, SOCK_RAW, 1);
  SOCKET("TIPC", AF_TIPC, SOCK_RDM, 0);
  SOCKET("BLUETOOTH", AF_BLUETOOTH, SOCK_RAW, 1);
  SOCKET("ALG", AF_ALG, SOCK_SEQPACKET, 0);
  SOCKET("NFC", AF_NFC, SOCK_RAW, 0);
  SOCKET("VSOCK stream", AF_VSOCK, SOCK_STREAM, 0);
  SOCKET("VSOCK datagram", AF_VSOCK, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  SOCKET("QIPCRTR", AF_QIPCRTR, SOCK_DGRAM, 0);
  SOCKET("SMC", AF_SMC, SOCK_STREAM, 0);
  SOCKET("XDP", AF_XDP, SOCK_RAW, 0);
  SOCKET("MCTP", AF_MCTP, SOCK_DGRAM, 0);
  SOCKET("beyond all", 63, SOCK_STREAM, 0);
  CALL("socket VSOCK, high bits set", SYS_socket, AF_VSOCK | (1L << 32), (long)SOCK_STREAM, 0L);
  CALL("socket INET, high bits set", SYS_socket, AF_INET | (1L << 32), (long)SOCK_STREAM, 0L);
  PAIR("UNIX", AF_UNIX);
  PAIR("TIPC", AF_TIPC);
  BEGIN("bind loopback") bound(AF_INET) END;
#ifdef __x86_64__
  // Other ways into the kernel.
  BEGIN("getpid by the 32-bit way") by_interrupt(20) END;
  BEGIN("socketcall by the 32-bit way") by_interrupt(102) END;
  BEGIN("unshare by the 32-bit way") by_interrupt(310) END;
  CALL("getpid by the x32 way", 0x40000000L + SYS_getpid);
  CALL("unshare by the x32 way", 0x40000000L + SYS_unshare, CLONE_NEWUSER);
#endif
  CALL("a call that no kernel has", 4000, 0, 0, 0);
  // Ordinary work.
  N(getpid);
  CALL("openat", SYS_openat, AT_FDCWD, "/etc/hosts", O_RDONLY, 0);
  CALL("openat2", SYS_openat2, AT_FDCWD, "/etc/hosts", (uint64_t[3]){0}, 24);
  CALL("statx", SYS_statx, AT_FDCWD, "/", 0, 0x7ff, (char[512]){0});
  CALL("faccessat2", SYS_faccessat2, AT_FDCWD, "/", 0, 0);
  CALL("mmap, executable", SYS_mmap, 0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CALL("mkdirat", SYS_mkdirat, AT_FDCWD, "/tmp/probe", 0700);
  CALL("mknodat fifo", SYS_mknodat, AT_FDCWD, "/tmp/fifo", S_IFIFO | 0600, 0);
  CALL("mknodat device", SYS_mknodat, AT_FDCWD, "/tmp/device", S_IFCHR | 0600, 259);
  CALL("memfd_create", SYS_memfd_create, "x", 0);
  CALL("eventfd2", SYS_eventfd2, 0, 0);
  CALL("epoll_create1", SYS_epoll_create1, 0);
  CALL("inotify_init1", SYS_inotify_init1, 0);
  CALL("signalfd4", SYS_signalfd4, -1, (uint64_t[1]){0}, 8, 0);
  CALL("timerfd_create", SYS_timerfd_create, 1, 0);
  CALL("getrandom", SYS_getrandom, (char[8]){0}, 8, 0);
  CALL("futex wake", SYS_futex, (int[1]){0}, 1, 1, 0, 0, 0);
  CALL("prctl name", SYS_prctl, 15, "probe", 0, 0, 0);
  CALL("membarrier", SYS_membarrier, 0, 0, 0);
  CALL("sched_getaffinity", SYS_sched_getaffinity, 0, 128, (char[128]){0});
  CALL("prlimit64", SYS_prlimit64, 0, 7, 0, (uint64_t[2]){0});
  CALL("shmget", SYS_shmget, 0, 4096, 01600);
  CALL("mq_open", SYS_mq_open, "probe", O_CREAT | O_RDWR, 0600, 0);
  CALL("seccomp, ask", SYS_seccomp, 2, 0, (uint32_t[1]){0x7fff0000});
  CALL("copy_file_range", SYS_copy_file_range, -1, 0, -1, 0, 1, 0);
  CALL("setuid, to root", SYS_setuid, 0);
  CALL("kill, of none", SYS_kill, 4000000, 0);
  return 0;
}
