//! Rules that the firewalls themselves wrote on Debian 12 (`nft -j list ruleset`), and rules written by hand.

use serde_json::json;

use super::*;

fn fixture(name: &str) -> Vec<BlockingChain> {
    let path = format!("{}/tests/fixtures/firewalls/{name}.json", env!("CARGO_MANIFEST_DIR"));
    walls([std::fs::read(path).unwrap().as_slice()])
}

#[test]
fn default_zones_of_firewalld_stop_traffic_and_names() {
    let found = fixture("firewalld");
    let chains: Vec<&str> = found.iter().map(|wall| wall.chain.as_str()).collect();
    assert_eq!(chains, ["inet firewalld filter_INPUT", "inet firewalld filter_FORWARD"]);
    assert!(found.iter().all(|wall| wall.author == Author::Firewalld));
    assert_eq!(found[0].stops.len(), 2, "DNS over both protocols");
    assert_eq!(found[1].stops.len(), 2, "answers are allowed: {:?}", found[1].stops);
}

#[test]
fn the_default_of_ufw_stops_traffic_and_names() {
    let found = fixture("ufw");
    let chains: Vec<&str> = found.iter().map(|wall| wall.chain.as_str()).collect();
    assert_eq!(chains, ["ip filter INPUT", "ip filter FORWARD"]);
    assert!(found.iter().all(|wall| wall.author == Author::Ufw));
}

#[test]
fn what_the_remedies_say_takes_the_walls_down() {
    assert_eq!(fixture("firewalld-zone"), []);
    assert_eq!(fixture("ufw-allowed"), []);
}

/// A table with one base chain of these rules.
fn chain(hook: &str, policy: &str, rules: &[Value]) -> Vec<BlockingChain> {
    let base =
        json!({"chain": {"family": "ip", "table": "filter", "name": "MAIN", "hook": hook, "policy": policy}});
    let inner = json!({"chain": {"family": "ip", "table": "filter", "name": "inner"}});
    let rules = rules.iter().map(|expr| {
        let name = if expr[0] == "inner" { "inner" } else { "MAIN" };
        let expr: Vec<&Value> = expr.as_array().unwrap().iter().filter(|part| part.is_object()).collect();
        json!({"rule": {"family": "ip", "table": "filter", "chain": name, "expr": expr}})
    });
    let all: Vec<Value> = [base, inner].into_iter().chain(rules).collect();
    walls([json!({"nftables": all}).to_string().as_bytes()])
}

fn matched(op: &str, key: &str, right: Value) -> Value {
    json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}})
}

#[test]
fn a_last_reject_counts_as_a_policy_does() {
    assert_eq!(chain("forward", "accept", &[]), []);
    assert_eq!(chain("forward", "drop", &[])[0].stops.len(), 3);
    for last in ["reject", "drop"] {
        assert_eq!(chain("forward", "accept", &[json!([{"counter": {}}, {last: null}])])[0].stops.len(), 3);
    }
    assert_eq!(chain("input", "drop", &[])[0].stops.len(), 2);
    assert_eq!(chain("output", "drop", &[]), [], "packets of apps do not pass the output hook");
    // The end of a chain that was entered by goto is the policy's; a chain that was entered by jump returns.
    let goto = json!([{"goto": {"target": "inner"}}]);
    let jump = json!([{"jump": {"target": "inner"}}]);
    let accept = json!([{"accept": null}]);
    let refuse = json!(["inner", {"xt": {"type": "target", "name": "REJECT"}}]);
    assert_eq!(chain("forward", "accept", &[goto.clone(), refuse.clone()])[0].stops.len(), 3);
    assert_eq!(chain("forward", "drop", &[jump, accept.clone()]), []);
    assert_eq!(chain("forward", "drop", &[goto, accept])[0].stops.len(), 3);
}

#[test]
fn accepts_for_bridges_take_the_wall_down_and_others_do_not() {
    let accept = |key: &str, name: &str| json!([matched("==", key, name.into()), {"accept": null}]);
    let both = [accept("iifname", "bk*"), accept("oifname", "bk*")];
    assert_eq!(chain("forward", "drop", &both), []);
    let own = [accept("iifname", "bkqwer*"), accept("oifname", "bkqwer*")];
    assert_eq!(chain("forward", "drop", &own), [], "one installation's bridges by name");
    assert_eq!(
        chain("forward", "drop", &both[..1])[0].stops,
        ["answers to apps from services and egress targets"]
    );
    assert_eq!(chain("forward", "drop", &[accept("iifname", "docker0")])[0].stops.len(), 3);
    let answers = json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}},
        {"accept": null}]);
    assert_eq!(chain("forward", "drop", &[answers, both[0].clone()]), []);
    // A rule on an address, or with a limit, decides nothing for certain.
    let perhaps = json!([{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": "10.0.0.1"}}, {"drop": null}]);
    assert_eq!(chain("forward", "accept", &[perhaps]), []);
    assert_eq!(
        chain("forward", "accept", &[json!([matched("!=", "iifname", "bk*".into()), {"drop": null}])])[0]
            .stops
            .len(),
        1
    );
    // A drop that names the bridges stops packets under any policy.
    let drop = json!([matched("==", "iifname", "bk*".into()), {"drop": null}]);
    assert_eq!(chain("forward", "accept", &[drop])[0].stops.len(), 2);
    // Port 53 by number, in a range, in a set; the other protocol does not count.
    for right in [json!(53), json!({"range": [1, 100]}), json!({"set": [22, 53]})] {
        let rule = |protocol: &str| {
            json!([{"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": "dport"}},
                "right": right.clone()}}, {"accept": null}])
        };
        assert_eq!(chain("input", "drop", &[rule("udp")])[0].stops, ["DNS queries over TCP"]);
        assert_eq!(chain("input", "drop", &[rule("th")]), []);
    }
    // Packets to the machine itself continue, for both ways to match them.
    let fib = json!({"match": {"op": "==", "left": {"fib": {"result": "type", "flags": "daddr"}}, "right": "local"}});
    for asks in [fib, json!({"xt": {"type": "match", "name": "addrtype"}})] {
        let rules = [
            json!([{"jump": {"target": "inner"}}]),
            json!(["inner", asks, {"return": null}]),
            json!(["inner", {"drop": null}]),
        ];
        assert_eq!(chain("input", "accept", &rules), []);
        assert_eq!(chain("forward", "accept", &rules)[0].stops.len(), 3);
    }
    let map = json!([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}],
        ["established", {"accept": null}], ["new", {"jump": {"target": "inner"}}]]}}}]);
    let inner = json!(["inner", {"accept": null}]);
    assert_eq!(chain("forward", "drop", &[map, inner]), []);
}

#[test]
fn own_tables_and_nonsense_are_no_walls() {
    let own = json!({"nftables": [{"chain": {"family": "inet", "table": "bulkhead_abcd", "name": "forward",
        "hook": "forward", "policy": "drop"}}]});
    assert_eq!(walls([own.to_string().as_bytes(), b"no json", b"{}"]), []);
    let six = json!({"nftables": [{"chain": {"family": "ip6", "table": "filter", "name": "FORWARD",
        "hook": "forward", "policy": "drop"}}]});
    assert_eq!(walls([six.to_string().as_bytes()]), [], "apps have no IPv6");
    // Chains that jump to each other terminate.
    let circle = json!([{"jump": {"target": "inner"}}]);
    let back = json!(["inner", {"jump": {"target": "inner"}}]);
    assert_eq!(chain("forward", "accept", &[circle, back]), []);
}
