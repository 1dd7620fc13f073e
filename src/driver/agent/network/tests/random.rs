//! Random packets, plans and texts, compared with a model that knows only the intended flows.

use proptest::prelude::*;

use super::*;

/// Models the kernel's decision on a packet that begins a connection, rule by rule as in the text.
fn kernel(table: &Table, packet: &Rule) -> bool {
    let holds = |set: Set| {
        table.set(set).iter().any(|rule| {
            let key = |r: &Rule| (r.network, r.source, r.protocol, r.port);
            key(rule) == key(packet) && (rule.first..=rule.last).contains(&packet.first)
        })
    };
    let closed = table.never.iter().any(|(first, last)| (*first..=*last).contains(&packet.first));
    let inside = shell().pool.contains(Ipv4Addr::from_bits(packet.first));
    table.sources.contains(&(packet.network, packet.source))
        && (holds(Set::Pairs) && inside
            || holds(Set::Services) && !inside
            || !closed && (holds(Set::Outside) || holds(Set::Resolved)) && !inside)
}

/// Returns the intended decision, without any table.
fn meant(standing: &ExpectedFacts, packet: &Rule) -> bool {
    let target = Ipv4Addr::from_bits(packet.first);
    let from = standing.apps.iter().find(|(_, place)| {
        place.network == packet.network && place.addresses.iter().any(|a| a.to_bits() == packet.source)
    });
    let Some((app, _)) = from else { return false };
    let closed =
        never().iter().any(|range| range.wall == ReservedKind::Closed && range.network.contains(target));
    standing.flows.get(app).into_iter().flatten().any(|flow| {
        let there = match &flow.target {
            Target::App { tenant, app } => standing
                .apps
                .get(app)
                .is_some_and(|place| place.tenant == *tenant && place.addresses.contains(&target)),
            Target::Service { network } | Target::Outside { network } => network.contains(target) && !closed,
            Target::Domain { domain } => standing
                .resolved
                .get(&(*app, domain.clone()))
                .is_some_and(|addresses| addresses.contains_key(&target)),
        };
        there && flow.protocol == packet.protocol && flow.port == packet.port
    })
}

fn standings() -> impl Strategy<Value = ExpectedFacts> {
    let target = prop_oneof![
        (0_u32..4, 1_i64..9).prop_map(|(network, id)| app(network, id)),
        prop::sample::select(vec!["10.5.0.2", "10.5.0.3", "192.168.7.7", "45.67.89.10", "192.88.99.0/24"])
            .prop_map(service),
        prop::sample::select(vec!["45.67.0.0/16", "45.67.89.0/24", "45.67.89.10", "8.0.0.0/8", "1.1.1.1"])
            .prop_map(outside),
        prop::sample::select(vec!["a.example", "b.example"]).prop_map(domain),
    ];
    let flows = prop::collection::vec(
        (target, any::<bool>(), prop::sample::select(vec![53_u16, 443, 8080])).prop_map(
            |(target, udp, port)| Flow {
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                ..flow("x", target, port)
            },
        ),
        0..6,
    );
    prop::collection::vec((0_u32..4, 0_usize..3, flows), 0..8).prop_map(|apps| {
        let mut standing = ExpectedFacts::default();
        let mut next = HashMap::new();
        for (n, (network, count, flows)) in apps.into_iter().enumerate() {
            let id = AppId(i64::try_from(n).unwrap() + 1);
            let first = next.entry(network).or_insert(2_u32);
            let hosts: Vec<u32> = (*first..*first + u32::try_from(count).unwrap()).collect();
            *first += u32::try_from(count).unwrap();
            standing.apps.insert(id, place(network, &hosts));
            standing.flows.insert(id, flows);
        }
        // As in the agent: a flow to an app that does not exist, or belongs to another tenant, is ignored.
        let tenants: HashMap<AppId, TenantName> =
            standing.apps.iter().map(|(id, place)| (*id, place.tenant.clone())).collect();
        for flows in standing.flows.values_mut() {
            flows.retain(|flow| match &flow.target {
                Target::App { tenant, app } => tenants.get(app) == Some(tenant),
                _ => true,
            });
        }
        // Resolved addresses are checked against the reserved ranges first.
        for (n, app) in standing.apps.keys().enumerate() {
            let address = ["45.67.89.10", "45.67.0.1"][n % 2];
            standing.resolved.extend([found(app.0, "a.example", &[address])]);
        }
        standing
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_packets_are_judged_as_they_were_meant(
        standing in standings(), later in standings(),
        packets in prop::collection::vec((0_u32..5, 0_u32..8, any::<u32>(), 0_usize..9, any::<bool>(), 0_usize..4), 64),
    ) {
        let (old, new) = (rules(&standing), rules(&later));
        let table = prove(old.text(), &walls(4), &standing).unwrap().into_table();
        let text = new.change(&old).unwrap();
        let changed = prove_change(text, &table, &walls(4), &later).unwrap().into_table();
        for (network, host, any, near, udp, port) in packets {
            let target = [
                any, 0x0a05_0002, 0x0a05_0003, 0x2d43_590a, 0x2d43_0001, 0xc058_6307, 0x0801_0203, 0xa9fe_a9fe,
                subnet(any % 4).first() + any % 8,
            ][near];
            let packet = Rule {
                network,
                source: subnet(network).first() + host,
                first: target,
                last: target,
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                port: [53, 443, 8080, 22][port],
            };
            prop_assert_eq!(kernel(&table, &packet), meant(&standing, &packet), "{:?}", packet);
            prop_assert_eq!(kernel(&changed, &packet), meant(&later, &packet), "{:?}", packet);
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(at in any::<prop::sample::Index>(), to in any::<char>(), cut in any::<bool>()) {
        let standing = example();
        let text = rules(&standing).text();
        let at = at.index(text.len());
        let mut changed: String = text[..at].to_owned();
        if !cut { changed.push(to); }
        changed.push_str(&text[at + 1..]);
        // One character removed or replaced: the text is unreadable, or it means the same.
        if let Ok(proven) = prove(changed, &walls(2), &standing) {
            prop_assert_eq!(proven.into_table(), table(&text, &shell()).unwrap());
        }
    }
}
