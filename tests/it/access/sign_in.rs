//! Sign-in and sign-out: accepted and refused credentials, and rate limits of guesses.

use std::time::Instant;

use bulkhead::access::PlatformRole;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use totp_rs::Builder;

use crate::support::{PASSWORD, Person, TestApp, page};

/// Returns the code that a device shows at this time.
fn code(secret: &str, seconds: u64) -> String {
    let plain = secret.replace(' ', "");
    let bytes = data_encoding::BASE32_NOPAD.decode(plain.as_bytes()).unwrap();
    let totp = Builder::new().with_secret(bytes).with_account_name("x").build_noncompliant();
    totp.generate(seconds).to_string()
}

fn now() -> u64 {
    bulkhead::access::second_factor::now()
}

/// Sets up a second factor through the pages. Returns the secret and the recovery codes.
async fn with_second_factor(person: &mut Person) -> (String, Vec<String>) {
    let answer = person.submit("/account", "/account/second-factor", &[]).await;
    assert_eq!(answer.status(), 200);
    let text = answer.text().await.unwrap();
    let secret = text.split("<code class=\"secret\">").nth(1).unwrap().split('<').next().unwrap().to_owned();
    assert!(text.contains("<svg") && text.contains("<path d=\"M"), "to scan");
    let token = page::form_token(&text);
    let wrong =
        person.post("/account/second-factor/confirmation", &[("form", &token), ("code", "000000")]).await;
    assert_eq!(wrong.status(), 422);
    let code = code(&secret, now() - 30);
    let answer =
        person.post("/account/second-factor/confirmation", &[("form", &token), ("code", &code)]).await;
    let text = answer.text().await.unwrap();
    let codes = page::secrets(&text);
    assert_eq!(codes.len(), 10, "{text}");
    (secret, codes)
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_session_begins_rotates_and_ends(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.person("ada", Some(PlatformRole::Admin)).await;
    let mut ada = app.nobody("ada");
    // A session reference that an attacker planted is worthless, before and after sign-in.
    ada.cookie = Some("bulkhead-loopback=planted".into());
    assert_eq!(ada.get("/account").await.status(), 401);
    assert_eq!(ada.sign_in("wrong").await, 401);
    let answer = ada.post("/login", &[("name", " Ada "), ("password", PASSWORD)]).await;
    assert_eq!(answer.status(), 303);
    let cookie = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    for part in ["HttpOnly", "SameSite=Lax", "Path=/"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains("Domain") && !cookie.contains("planted"), "{cookie}");
    let first = ada.clone();
    assert!(ada.page("/account").await.contains("ada"));
    // A new sign-in ends the previous session.
    assert_eq!(ada.sign_in(PASSWORD).await, 303);
    assert_ne!(ada.cookie, first.cookie);
    assert_eq!(first.clone().get("/account").await.status(), 401, "rotated");
    // After sign-out, the reference is invalid, also as a copy.
    let copy = ada.clone();
    assert_eq!(ada.submit("/account", "/logout", &[]).await.status(), 303);
    assert!(ada.cookie.is_none());
    assert_eq!(copy.clone().get("/account").await.status(), 401, "replay after signing out");
    // Only hashes are stored.
    let reference = copy.cookie.unwrap().split('=').nth(1).unwrap().to_owned();
    let text: String = sqlx::query_scalar("SELECT coalesce(string_agg(s::text, ' '), '') FROM session s")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert!(!text.contains(&reference));
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_session_has_its_time(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    // The clock of the database decides, so the test moves the stored times.
    app.sql("UPDATE session SET last_seen_at = now() - interval '29 minutes'").await;
    ada.page("/account").await;
    let idle: f64 =
        sqlx::query_scalar("SELECT extract(epoch FROM now() - last_seen_at)::float8 FROM session")
            .fetch_one(&app.root)
            .await
            .unwrap();
    assert!(idle < 5.0, "a request keeps the session alive");
    app.sql("UPDATE session SET last_seen_at = now() - interval '31 minutes'").await;
    assert_eq!(ada.get("/account").await.status(), 401, "idle");
    assert_eq!(ada.sign_in(PASSWORD).await, 303);
    app.sql("UPDATE session SET created_at = now() - interval '11 hours 59 minutes'").await;
    ada.page("/account").await;
    app.sql("UPDATE session SET created_at = now() - interval '12 hours 1 second'").await;
    assert_eq!(ada.get("/account").await.status(), 401, "twelve hours in all");
    // Sensitive actions require a confirmation after ten minutes.
    assert_eq!(ada.sign_in(PASSWORD).await, 303);
    app.sql("UPDATE session SET confirmed_at = now() - interval '11 minutes'").await;
    let answer =
        ada.submit("/account", "/account/tokens", &[("name", "x"), ("opens", "/admin"), ("days", "1")]).await;
    assert_eq!(answer.status(), 303);
    assert_eq!(answer.headers()["location"], "/confirm?next=/account");
    let (status, body) =
        ada.api("POST", "/api/v1/me/tokens", json!({"name": "x", "role": "admin", "days": 1})).await;
    assert_eq!((status, body["code"].as_str()), (403, Some("BH-407")));
    let before = ada.cookie.clone();
    let wrong = ada.submit("/confirm", "/confirm", &[("password", "wrong")]).await;
    assert_eq!(wrong.status(), 401);
    let right =
        ada.submit("/confirm", "/confirm", &[("password", PASSWORD), ("next", "//evil.example")]).await;
    assert_eq!((right.status().as_u16(), right.headers()["location"].to_str().unwrap()), (303, "/"));
    assert_ne!(ada.cookie, before, "a new reference with more right");
    let answer =
        ada.submit("/account", "/account/tokens", &[("name", "x"), ("opens", "/admin"), ("days", "1")]).await;
    assert_eq!(answer.status(), 200);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn sessions_are_seen_and_ended(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let mut phone = app.nobody("ada");
    assert_eq!(phone.sign_in(PASSWORD).await, 303);
    let mut laptop = app.nobody("ada");
    assert_eq!(laptop.sign_in(PASSWORD).await, 303);
    let (_, list) = ada.api("GET", "/api/v1/me/sessions", Value::Null).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 3, "{list}");
    let id = list["items"][1]["id"].as_i64().unwrap();
    assert_eq!(ada.api("DELETE", &format!("/api/v1/me/sessions/{id}"), Value::Null).await.0, 204);
    assert_eq!(phone.get("/account").await.status(), 401);
    laptop.page("/account").await;
    // An account cannot end the session of another one.
    let mut bob = app.person("bob", None).await;
    let own = list["items"][0]["id"].as_i64().unwrap();
    assert_eq!(bob.api("DELETE", &format!("/api/v1/me/sessions/{own}"), Value::Null).await.0, 404);
    // A password change ends all other sessions.
    let fields = [("current", PASSWORD), ("new", "another wholly odd sentence")];
    assert_eq!(ada.submit("/account", "/account/password", &fields).await.status(), 303);
    assert_eq!(laptop.get("/account").await.status(), 401);
    ada.page("/account").await;
    assert_eq!(laptop.sign_in(PASSWORD).await, 401);
    assert_eq!(laptop.sign_in("another wholly odd sentence").await, 303);
    // The form shows why a password is rejected.
    for (current, new, says) in [
        ("wrong", "yet another wholly odd one", "the current password is wrong"),
        ("another wholly odd sentence", "password123", "too easy to guess"),
        ("another wholly odd sentence", "short", "at least 8"),
    ] {
        let answer = ada.submit("/account", "/account/password", &[("current", current), ("new", new)]).await;
        assert_eq!(answer.status(), 422);
        assert!(answer.text().await.unwrap().contains(says), "{says}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn who_is_disabled_is_out_at_once(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let mut bob = app.person("bob", Some(PlatformRole::Auditor)).await;
    let (_, made) =
        bob.api("POST", "/api/v1/me/tokens", json!({"name": "x", "role": "auditor", "days": 1})).await;
    let token = made["token"].as_str().unwrap().to_owned();
    app.get(&token, "/api/v1/tenants").await;
    let (status, body) = ada.api("PATCH", "/api/v1/accounts/bob", json!({"disabled": true})).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(bob.get("/account").await.status(), 401);
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants", Value::Null).await.0, 401);
    assert_eq!(bob.sign_in(PASSWORD).await, 401, "same response as for a wrong password");
    // Enabled again: old sessions stay invalid, and the password works.
    assert_eq!(ada.api("PATCH", "/api/v1/accounts/bob", json!({"disabled": false})).await.0, 200);
    assert_eq!(bob.get("/account").await.status(), 401);
    assert_eq!(bob.sign_in(PASSWORD).await, 303);
    // A revoked role ends with the next request, for tokens too.
    app.get(&token, "/api/v1/tenants").await;
    assert_eq!(ada.api("PATCH", "/api/v1/accounts/bob", json!({"platform_role": null})).await.0, 200);
    assert_eq!(bob.api("GET", "/api/v1/tenants", Value::Null).await.0, 404);
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants", Value::Null).await.0, 404);
    // The last admin cannot be disabled.
    let (status, body) = ada.api("PATCH", "/api/v1/accounts/ada", json!({"disabled": true})).await;
    assert_eq!(status, 409, "{body}");
    ada.page("/account").await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_second_factor_holds(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let mut other = app.nobody("ada");
    assert_eq!(other.sign_in(PASSWORD).await, 303);
    let (secret, codes) = with_second_factor(&mut ada).await;
    assert_eq!(other.get("/account").await.status(), 401, "earlier sessions end");
    // The password alone no longer signs in.
    let mut other = app.nobody("ada");
    assert_eq!(other.sign_in(PASSWORD).await, 303);
    assert!(other.cookie.is_none() && other.step.is_some());
    assert_eq!(other.get("/account").await.status(), 401);
    let try_code = async |person: &mut Person, code: &str| {
        person.post("/login/second-factor", &[("code", code)]).await.status().as_u16()
    };
    assert_eq!(try_code(&mut other, "123456").await, 401);
    let good = code(&secret, now());
    assert_eq!(try_code(&mut other, &good).await, 303);
    other.page("/account").await;
    // A code works once, also for an attacker who saw it.
    let mut thief = app.nobody("ada");
    assert_eq!(thief.sign_in(PASSWORD).await, 303);
    assert_eq!(try_code(&mut thief, &good).await, 401);
    assert_eq!(try_code(&mut thief, &code(&secret, now() - 30)).await, 401, "nor an earlier code");
    // After five attempts the sign-in must start again.
    for _ in 0..3 {
        try_code(&mut thief, "000000").await;
    }
    assert_eq!(try_code(&mut thief, &codes[0]).await, 303);
    assert!(thief.cookie.is_none(), "too late");
    // A recovery code works once, also with two concurrent requests on two replicas.
    let another = app.another().await;
    let (mut here, mut there) = (app.nobody("ada"), app.nobody("ada"));
    there.address.clone_from(&another.address);
    assert_eq!(here.sign_in(PASSWORD).await, 303);
    assert_eq!(there.sign_in(PASSWORD).await, 303);
    let form = [("code", codes[1].as_str())];
    let (one, two) =
        tokio::join!(here.post("/login/second-factor", &form), there.post("/login/second-factor", &form));
    let mut answers = [one.status().as_u16(), two.status().as_u16()];
    answers.sort_unstable();
    assert_eq!(answers, [303, 401]);
    another.stop().await;
    // The confirmation requires the code besides the password.
    app.sql("UPDATE session SET confirmed_at = now() - interval '1 hour'").await;
    let (status, _) = other.api("POST", "/api/v1/me/confirmation", json!({"password": PASSWORD})).await;
    assert_eq!(status, 422);
    let body = json!({"password": PASSWORD, "code": codes[2]});
    assert_eq!(other.api("POST", "/api/v1/me/confirmation", body).await.0, 204);
    // The secret is not in the database. An admin can remove the factor for a user who lost the device.
    let plain = data_encoding::BASE32_NOPAD.decode(secret.replace(' ', "").as_bytes()).unwrap();
    let sealed: Vec<u8> =
        sqlx::query_scalar("SELECT sealed FROM second_factor").fetch_one(&app.root).await.unwrap();
    assert!(!sealed.windows(plain.len()).any(|part| part == plain));
    let admin = app.admin().await;
    assert_eq!(app.ask(&admin, "DELETE", "/api/v1/accounts/ada/second-factor", Value::Null).await.0, 204);
    assert_eq!(other.get("/account").await.status(), 401);
    assert_eq!(other.sign_in(PASSWORD).await, 303);
    assert!(other.cookie.is_some());
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn nobody_is_told_who_is_here(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.person("ada", Some(PlatformRole::Admin)).await;
    app.person("gone", None).await;
    app.sql("UPDATE account SET disabled_at = now() WHERE name = 'gone'").await;
    let mut answers = Vec::new();
    for name in ["ada", "gone", "nobody-of-this-name", "../etc", "ada'--"] {
        let before = app.one.platform.desk.passwords.computed();
        let answer = app.nobody(name).post("/login", &[("name", name), ("password", "wrong one")]).await;
        let headers: Vec<String> = answer.headers().keys().map(ToString::to_string).collect();
        let status = answer.status();
        let text = answer.text().await.unwrap().replace(&format!("value=\"{name}\""), "value=\"\"");
        let text = text.replace("value=\"ada&#39;--\"", "value=\"\"");
        assert_eq!(app.one.platform.desk.passwords.computed(), before + 1, "{name}: the same work is done");
        answers.push((status, headers, text));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
    // A hash that is weaker than today's is replaced at the next sign-in.
    app.sql("UPDATE account SET password = '$argon2id$v=19$m=4096,t=1,p=1$c29tZXNhbHRzb21lc2FsdA$JmDGqQjXMe5FKkjvYMwsCnA0vWw3wkVk2RD0QdAT1Ks' WHERE name = 'ada'").await;
    let weak = argon2_of("weak but long enough");
    sqlx::query("UPDATE account SET password = $1 WHERE name = 'ada'")
        .bind(weak)
        .execute(&app.root)
        .await
        .unwrap();
    assert_eq!(app.nobody("ada").sign_in("weak but long enough").await, 303);
    let now: String = sqlx::query_scalar("SELECT password FROM account WHERE name = 'ada'")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert!(now.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{now}");
    assert_eq!(app.nobody("ada").sign_in("weak but long enough").await, 303);
}

fn argon2_of(password: &str) -> String {
    use argon2::password_hash::PasswordHasher;
    let params = argon2::Params::new(8_192, 1, 1, None).unwrap();
    let weak = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
    weak.hash_password(password.as_bytes()).unwrap().to_string()
}

/// Ten thousand guesses over two replicas, one of which restarts in between. The number of accepted guesses
/// matches the bucket exactly.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn ten_thousand_guesses_are_counted_over_replicas_and_restarts(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let app = TestApp::new(options, connect).await;
    app.person("ada", Some(PlatformRole::Admin)).await;
    app.sql("TRUNCATE throttle, known_place").await;
    let mut second = app.another().await;
    let computed = |replica: &crate::support::Replica| replica.platform.desk.passwords.computed();
    let (first_before, mut in_others) = (computed(&app.one), 0);
    let begun = Instant::now();
    let (mut let_through, mut slowed) = (0_u64, 0_u64);
    for round in 0..10 {
        if round == 5 {
            in_others += computed(&second);
            second.stop().await;
            second = app.another().await;
        }
        let tasks: Vec<_> = (0..20)
            .map(|worker| {
                let mut guesser = app.nobody("ada");
                if worker % 2 == 1 {
                    guesser.address.clone_from(&second.address);
                }
                tokio::spawn(async move {
                    let (mut open, mut shut) = (0, 0);
                    for guess in 0..50 {
                        let password = format!("guess {worker} {guess}");
                        let answer =
                            guesser.post("/login", &[("name", "ada"), ("password", &password)]).await;
                        match answer.status().as_u16() {
                            401 => open += 1,
                            429 => {
                                assert!(
                                    answer.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap()
                                        > 0
                                );
                                shut += 1;
                            }
                            other => panic!("{other}"),
                        }
                    }
                    (open, shut)
                })
            })
            .collect();
        for task in tasks {
            let (open, shut) = task.await.unwrap();
            let_through += open;
            slowed += shut;
        }
    }
    let seconds = begun.elapsed().as_secs();
    in_others += computed(&second);
    assert_eq!(let_through + slowed, 10_000);
    // Ten at once, then one per half minute.
    let most = 10 + seconds / 30 + 1;
    assert!((10..=most).contains(&let_through), "{let_through} of at most {most} in {seconds} s");
    assert_eq!(
        computed(&app.one) - first_before + in_others,
        let_through,
        "no further password was computed"
    );
    // The limit delays and does not lock out: after the wait, the correct password works.
    assert_eq!(app.nobody("ada").sign_in(PASSWORD).await, 429);
    app.sql("UPDATE throttle SET tat = tat - interval '10 minutes'").await;
    assert_eq!(app.nobody("ada").sign_in(PASSWORD).await, 303);
    // On a known network, guesses from elsewhere cause no delay.
    app.sql("TRUNCATE throttle").await;
    for address in 0..120 {
        let address: std::net::IpAddr = format!("10.9.0.{address}").parse().unwrap();
        let _ = app.one.platform.desk.throttle.guess("ada", address, None).await;
    }
    let far: std::net::IpAddr = "10.9.1.1".parse().unwrap();
    assert!(
        app.one.platform.desk.throttle.guess("ada", far, None).await.is_err(),
        "an unknown network waits"
    );
    assert_eq!(app.nobody("ada").sign_in(PASSWORD).await, 303, "a known network does not wait");
    // A known browser does not wait either, on any network. The cookie of another account has no effect.
    app.sql("TRUNCATE throttle, known_place").await;
    let mut own = app.nobody("ada");
    assert_eq!(own.sign_in(PASSWORD).await, 303);
    own.cookie = None;
    app.sql("TRUNCATE throttle, known_place").await;
    for address in 0..120 {
        let address: std::net::IpAddr = format!("10.9.0.{address}").parse().unwrap();
        let _ = app.one.platform.desk.throttle.guess("ada", address, None).await;
    }
    assert_eq!(app.nobody("ada").sign_in(PASSWORD).await, 429, "an unknown browser on an unknown network");
    let mut other = app.nobody("ada");
    app.person("bob", None).await;
    let mut bob = app.nobody("bob");
    assert_eq!(bob.sign_in(PASSWORD).await, 303);
    other.known = bob.known;
    assert_eq!(other.sign_in(PASSWORD).await, 429);
    assert_eq!(own.sign_in(PASSWORD).await, 303, "the known browser");
    second.stop().await;
}
