//! The text of the nftables table.

use std::collections::BTreeSet;

use super::{Rules, seconds};
use crate::policy::read::Shell;

impl Rules {
    /// Returns the text of the table. Loading it replaces the applied table in one step.
    #[must_use]
    #[expect(clippy::too_many_lines, reason = "a table is read in one piece")]
    pub fn text(&self) -> String {
        let Shell { table, prefix, prober, pool, pace } = &self.shell;
        let burst = self.shell.burst();
        let bridges = format!("\"{prefix}*\"");
        let list = |elements: &BTreeSet<String>| {
            if elements.is_empty() {
                return String::new();
            }
            let list: Vec<&str> = elements.iter().map(String::as_str).collect();
            format!("    elements = {{ {} }}\n", list.join(", "))
        };
        let [sources, trial, gateways, pairs, services, outside, watched] =
            self.elements().map(|(_, elements)| list(&elements));
        let now = seconds();
        let resolved = self.resolved.iter().filter(|(_, end)| **end > now);
        let resolved = list(&resolved.map(|(to, end)| self.timed(to, end - now)).collect());
        let never = list(&self.never.iter().map(ToString::to_string).collect());
        let key = "type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service";
        let to = "iifname . ip saddr . ip daddr . meta l4proto . th dport";
        let from =
            "ct direction reply ct state established oifname . ip daddr . ip saddr . meta l4proto . th sport";
        let errors = "icmp type { destination-unreachable, time-exceeded } ct state related accept";
        // The records a second of each network are limited: no tenant can fill the set that all share.
        let record = format!(
            "meta l4proto {{ tcp, udp }} update @pace {{ iifname limit rate 5/second burst 50 packets }} update @denied {{ {to} }}"
        );
        let hasty = record.replacen("update @denied", "update @hasty", 1);
        let seen = record.replacen("update @pace", "ct state new update @pace", 1).replacen(
            "update @denied",
            "update @seen",
            1,
        );
        let unhidden_from = from.replacen("oifname", "ip saddr != @never oifname", 1);
        format!(
            r"add table inet {table}
delete table inet {table}
table inet {table} {{
  set sources {{
    type ifname . ether_addr . ipv4_addr
{sources}  }}
  set pairs {{
    {key}
{pairs}  }}
  set services {{
    {key}
{services}  }}
  set outside {{
    {key}
    flags interval
{outside}  }}
  set watched {{
    {key}
    flags interval
    counter
{watched}  }}
  set resolved {{
    {key}
    flags timeout
{resolved}  }}
  set gateways {{
    type ifname . ipv4_addr
{gateways}  }}
  set trial {{
    type ifname
{trial}  }}
  set never {{
    type ipv4_addr
    flags interval
{never}  }}
  set denied {{
    {key}
    size 65536
    flags dynamic,timeout
    timeout 1m
  }}
  set seen {{
    {key}
    size 65536
    flags dynamic,timeout
    timeout 1m
  }}
  set hasty {{
    {key}
    size 65536
    flags dynamic,timeout
    timeout 1m
  }}
  set hurried {{
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 10s
  }}
  set begun {{
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 1m
  }}
  set pace {{
    type ifname
    size 65536
    flags dynamic,timeout
    timeout 1m
  }}
  chain arrive {{
    type filter hook prerouting priority raw; policy accept;
    iifname {bridges} meta nfproto ipv6 drop
    iifname {bridges} iifname . ether saddr . ip saddr @sources accept
    iifname {bridges} goto discard
  }}
  chain enter {{
    type filter hook prerouting priority filter - 10; policy accept;
    iifname {bridges} goto entered
  }}
  chain entered {{
    ip ttl < 2 goto discard
    ip daddr {pool} ct state invalid drop
    ip daddr {pool} ct direction original ct state != related iifname . ip daddr != @gateways {to} != @pairs goto refuse
    fib daddr type local ct direction original iifname . ip daddr != @gateways goto refuse
  }}
  chain through {{
    type filter hook forward priority filter - 10; policy accept;
    iifname {bridges} goto from_tenant
    oifname {bridges} goto to_tenant
  }}
  chain from_tenant {{
    ct state invalid drop
    {to} @watched
    {to} @pairs oifname {bridges} accept
    {from} @pairs oifname {bridges} accept
    {errors}
    {to} @services oifname != {bridges} accept
    ip daddr @never goto refuse
    {to} @outside oifname != {bridges} accept
    {to} @resolved oifname != {bridges} accept
    iifname @trial oifname != {bridges} {seen}
    iifname @trial oifname != {bridges} accept
    goto refuse
  }}
  chain to_tenant {{
    {from} @services accept
    {unhidden_from} @outside accept
    {unhidden_from} @resolved accept
    ct direction reply ct state established ip saddr != @never oifname @trial accept
    {errors}
    drop
  }}
  chain into_host {{
    type filter hook input priority filter - 10; policy accept;
    iifname {bridges} goto from_tenant_to_host
  }}
  chain from_tenant_to_host {{
    iifname . ip daddr @gateways meta l4proto {{ tcp, udp }} th dport 53 accept
    meta l4proto tcp ct direction reply ct state established accept
    meta l4proto tcp tcp flags & (syn | ack) != syn drop
    goto refuse
  }}
  chain out_of_host {{
    type filter hook output priority filter - 10; policy accept;
    oifname {bridges} goto host_to_tenant
  }}
  chain host_to_tenant {{
    meta l4proto tcp meta skuid {prober} accept
    meta l4proto {{ tcp, udp }} th sport 53 ct direction reply ct state established accept
    icmp type destination-unreachable accept
    reject with icmpx admin-prohibited
  }}
  chain through_at_last {{
    type filter hook forward priority filter + 10; policy accept;
    iifname {bridges} ct state new ct status & confirmed == 0 goto begin
  }}
  chain into_host_at_last {{
    type filter hook input priority filter + 10; policy accept;
    iifname {bridges} ct state new ct status & confirmed == 0 goto begin
  }}
  chain begin {{
    update @begun {{ iifname limit rate over {pace}/second burst {burst} packets }} goto slow_down
  }}
  chain leave {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {pool} oifname != {bridges} masquerade
  }}
  chain slow_down {{
    update @hurried {{ iifname }}
    {hasty}
    drop
  }}
  chain refuse {{
    {record}
    reject with icmpx admin-prohibited
  }}
  chain discard {{
    {record}
    drop
  }}
}}
"
        )
    }
}
