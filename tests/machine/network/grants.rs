//! Grants between tenants.

use serde_json::json;

use super::{delete, instance, put, two_tenants, until};
use crate::outside::greets;
use crate::support::Machine;

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_app_is_reached_only_while_both_agree() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("beta", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let (api, _) = instance(&machine, "beta", "api").await;
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [beta/api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "nothing is offered");
    // The answers to an offer to a tenant that exists and to one that does not are alike.
    let offer = |to: &str| json!({"app": "api", "tenant": to, "to_app": "web"});
    let (status, nobody) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("nobody-here")).await;
    let (also, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("acme")).await;
    assert_eq!((status, also), (201, 201), "{nobody} {grant}");
    assert_eq!(
        nobody.as_object().unwrap().keys().collect::<Vec<_>>(),
        grant.as_object().unwrap().keys().collect::<Vec<_>>()
    );
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "an offer alone opens nothing");
    let received = machine.get("/api/v1/tenants/acme/grants/received").await;
    assert_eq!(received["items"][0]["tenant"], "beta", "{received}");
    let id = received["items"][0]["id"].as_i64().unwrap();
    // The grant is accepted before the deploy: the deploy is valid only then.
    put(&machine, &format!("/api/v1/tenants/acme/grants/{id}/acceptance"), json!({})).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    assert!(greets(&web, api, 8080), "both agree: {}", machine.tail("agent"));
    assert!(!greets(&web, api, 8081));
    // A probe by the platform sees the connection in the other instance's list of sockets.
    let reach = |to: &str, port: u16| format!("/api/v1/tenants/acme/apps/web/reach?to={to}&port={port}");
    let (_, probe) = machine.send("POST", &reach("beta/api", 8080), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("reached"), &json!(true)), "{probe}");
    // A probe by address works too, and so does the app's probe of itself.
    for to in [api.to_string(), "web".to_owned(), instance(&machine, "acme", "web").await.0.to_string()] {
        let (_, probe) = machine.send("POST", &reach(&to, 8080), json!({})).await;
        assert_eq!((&probe["open"], &probe["agrees"]), (&json!(true), &json!(true)), "{to}: {probe}");
    }
    let (_, probe) = machine.send("POST", &reach(&api.to_string(), 8081), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("prohibited"), &json!(true)), "{probe}");
    // The same from the command line.
    let ask = |to: &str, port: &str| {
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["net", "can-reach", "acme/web", to, port, "--probe", "--url", &machine.address()])
            .env("BULKHEAD_TOKEN", &machine.admin)
            .output()
            .unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    let (code, words) = ask("beta/api", "8080");
    assert!(code == Some(0) && words.contains("tried: reached"), "{words}");
    for (to, open) in [("web", 0), ("acme/web", 0), ("beta/web", 1)] {
        let (code, words) = ask(to, "8080");
        assert_eq!(code, Some(open), "{to}: {words}");
    }
    let (code, words) = ask("169.254.169.254", "80");
    assert!(code == Some(1) && words.contains("link-local"), "{words}");
    let (own, _) = instance(&machine, "acme", "web").await;
    let (_, beta) = instance(&machine, "beta", "api").await;
    assert!(!greets(&beta, own, 8080), "in one direction alone");
    // Another app of the tenant may be deployed with the name, but the grant is for `web` only.
    assert_eq!(machine.deploy("acme", "spy", asking).await.0, 202);
    let (_, spy) = instance(&machine, "acme", "spy").await;
    assert!(!greets(&spy, api, 8080), "it was granted to one app");
    // The owner changes the port: the grant is for the app, so the new port opens.
    assert_eq!(
        machine
            .deploy(
                "beta",
                "api",
                "image: web:1\nport: 8082\ncommand: [/bin/busybox, httpd, -f, -p, '8082', -h/www]\n"
            )
            .await
            .0,
        202
    );
    let (api, _) = instance(&machine, "beta", "api").await;
    until(10, "the new port", || greets(&web, api, 8082)).await;
    // Time from accepting to an open connection: ended by the receiver, offered and accepted again.
    delete(&machine, &format!("/api/v1/tenants/acme/grants/{id}")).await;
    until(5, "given back", || !greets(&web, api, 8082)).await;
    delete(&machine, &format!("/api/v1/tenants/beta/grants/{id}")).await;
    let (_, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("acme")).await;
    let id = grant["id"].as_i64().unwrap();
    put(&machine, &format!("/api/v1/tenants/acme/grants/{id}/acceptance"), json!({})).await;
    let took = until(5, "open again", || greets(&web, api, 8082)).await;
    println!("from accepted to through: {} ms", took.as_millis());
    // The owner withdraws without the receiver.
    delete(&machine, &format!("/api/v1/tenants/beta/grants/{id}")).await;
    until(5, "withdrawn", || !greets(&web, api, 8082)).await;
    let plans = machine.get("/api/v1/tenants/acme/network/plans").await;
    assert!(
        plans["items"][0]["causes"].to_string().contains("the grant of beta/api is withdrawn"),
        "{plans}"
    );
    // A grant with an expiry ends by itself.
    let (_, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("acme")).await;
    let id = grant["id"].as_i64().unwrap();
    put(&machine, &format!("/api/v1/tenants/acme/grants/{id}/acceptance"), json!({})).await;
    until(5, "open for a while", || greets(&web, api, 8082)).await;
    machine.sql("UPDATE grant_offer SET expires_at = now() + interval '2 seconds'; UPDATE work SET due_at = now() WHERE kind = 'network'");
    until(10, "expired", || !greets(&web, api, 8082)).await;
    // No other tenant sees any of it.
    let eve = machine.tenant("gamma").await;
    drop(eve);
    let none = machine.get("/api/v1/tenants/gamma/grants/received").await;
    assert_eq!(none["items"], json!([]));
}
