//! The exact text of the only table that can be verified. It stands here deliberately apart from the code
//! that prints the table: a change of one without the other is rejected.

/// The shape: `T` is the table, `B` the bridges, `U` the prober, `P` the pool. `R` is the limit of new
/// connections a second for a tenant's apps, `S` the burst. A line of the form `=NAME` stands for the
/// elements of that set, if it has any.
pub(super) const SHAPE: &str = r"add table inet T
delete table inet T
table inet T {
  set sources {
    type ifname . ether_addr . ipv4_addr
=sources
  }
  set pairs {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
=pairs
  }
  set services {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
=services
  }
  set outside {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    flags interval
=outside
  }
  set watched {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    flags interval
    counter
=watched
  }
  set resolved {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    flags timeout
=resolved
  }
  set gateways {
    type ifname . ipv4_addr
=gateways
  }
  set trial {
    type ifname
=trial
  }
  set never {
    type ipv4_addr
    flags interval
=never
  }
  set denied {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    size 65536
    flags dynamic,timeout
    timeout 1m
  }
  set seen {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    size 65536
    flags dynamic,timeout
    timeout 1m
  }
  set hasty {
    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service
    size 65536
    flags dynamic,timeout
    timeout 1m
  }
  set hurried {
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 10s
  }
  set begun {
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 1m
  }
  set pace {
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 1m
  }
  chain arrive {
    type filter hook prerouting priority raw; policy accept;
    iifname B meta nfproto ipv6 drop
    iifname B iifname . ether saddr . ip saddr @sources accept
    iifname B goto discard
  }
  chain enter {
    type filter hook prerouting priority filter - 10; policy accept;
    iifname B goto entered
  }
  chain entered {
    ip ttl < 2 goto discard
    ip daddr P ct state invalid drop
    ip daddr P ct direction original ct state != related iifname . ip daddr != @gateways iifname . ip saddr . ip daddr . meta l4proto . th dport != @pairs goto refuse
    fib daddr type local ct direction original iifname . ip daddr != @gateways goto refuse
  }
  chain through {
    type filter hook forward priority filter - 10; policy accept;
    iifname B goto from_tenant
    oifname B goto to_tenant
  }
  chain from_tenant {
    ct state invalid drop
    iifname . ip saddr . ip daddr . meta l4proto . th dport @watched
    iifname . ip saddr . ip daddr . meta l4proto . th dport @pairs oifname B accept
    ct direction reply ct state established oifname . ip daddr . ip saddr . meta l4proto . th sport @pairs oifname B accept
    icmp type { destination-unreachable, time-exceeded } ct state related accept
    iifname . ip saddr . ip daddr . meta l4proto . th dport @services oifname != B accept
    ip daddr @never goto refuse
    iifname . ip saddr . ip daddr . meta l4proto . th dport @outside oifname != B accept
    iifname . ip saddr . ip daddr . meta l4proto . th dport @resolved oifname != B accept
    iifname @trial oifname != B meta l4proto { tcp, udp } ct state new update @pace { iifname limit rate 5/second burst 50 packets } update @seen { iifname . ip saddr . ip daddr . meta l4proto . th dport }
    iifname @trial oifname != B accept
    goto refuse
  }
  chain to_tenant {
    ct direction reply ct state established oifname . ip daddr . ip saddr . meta l4proto . th sport @services accept
    ct direction reply ct state established ip saddr != @never oifname . ip daddr . ip saddr . meta l4proto . th sport @outside accept
    ct direction reply ct state established ip saddr != @never oifname . ip daddr . ip saddr . meta l4proto . th sport @resolved accept
    ct direction reply ct state established ip saddr != @never oifname @trial accept
    icmp type { destination-unreachable, time-exceeded } ct state related accept
    drop
  }
  chain into_host {
    type filter hook input priority filter - 10; policy accept;
    iifname B goto from_tenant_to_host
  }
  chain from_tenant_to_host {
    iifname . ip daddr @gateways meta l4proto { tcp, udp } th dport 53 accept
    meta l4proto tcp ct direction reply ct state established accept
    meta l4proto tcp tcp flags & (syn | ack) != syn drop
    goto refuse
  }
  chain out_of_host {
    type filter hook output priority filter - 10; policy accept;
    oifname B goto host_to_tenant
  }
  chain host_to_tenant {
    meta l4proto tcp meta skuid U accept
    meta l4proto { tcp, udp } th sport 53 ct direction reply ct state established accept
    icmp type destination-unreachable accept
    reject with icmpx admin-prohibited
  }
  chain through_at_last {
    type filter hook forward priority filter + 10; policy accept;
    iifname B ct state new ct status & confirmed == 0 goto begin
  }
  chain into_host_at_last {
    type filter hook input priority filter + 10; policy accept;
    iifname B ct state new ct status & confirmed == 0 goto begin
  }
  chain begin {
    update @begun { iifname limit rate over R/second burst S packets } goto slow_down
  }
  chain leave {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr P oifname != B masquerade
  }
  chain slow_down {
    update @hurried { iifname }
    meta l4proto { tcp, udp } update @pace { iifname limit rate 5/second burst 50 packets } update @hasty { iifname . ip saddr . ip daddr . meta l4proto . th dport }
    drop
  }
  chain refuse {
    meta l4proto { tcp, udp } update @pace { iifname limit rate 5/second burst 50 packets } update @denied { iifname . ip saddr . ip daddr . meta l4proto . th dport }
    reject with icmpx admin-prohibited
  }
  chain discard {
    meta l4proto { tcp, udp } update @pace { iifname limit rate 5/second burst 50 packets } update @denied { iifname . ip saddr . ip daddr . meta l4proto . th dport }
    drop
  }
}
";
