//! Commands that call the API, like any client. The token comes from the environment, never from the
//! arguments, which every user on the machine can read.

use std::process::ExitCode;
use std::time::Duration;

use bulkhead::outgoing;
use serde_json::Value;

use crate::{NetCommand, Output, block_on, print};

/// Shows whether an app can reach a destination. Exit code 0: allowed (and reached, with --probe); 1: denied;
/// 2: the plan and the probe differ.
pub(crate) fn can_reach(command: NetCommand) -> Result<ExitCode, String> {
    let NetCommand::CanReach { app, to, port, udp, probe, url, output } = command;
    let tenant = app.tenant.ok_or("name the app as TENANT/APP")?;
    let token = std::env::var("BULKHEAD_TOKEN")
        .ok()
        .filter(|token| !token.trim().is_empty())
        .ok_or("set BULKHEAD_TOKEN to an API token (create one in the console under Tokens)")?;
    let answer: Value = block_on(async {
        let client =
            outgoing::client().timeout(Duration::from_secs(20)).build().map_err(|e| e.to_string())?;
        let address = format!("{url}/api/v1/tenants/{tenant}/apps/{}/reach", app.app);
        let request = if probe { client.post(address) } else { client.get(address) };
        let protocol = if udp { "udp" } else { "tcp" };
        let port = port.to_string();
        let query = [("to", to.as_str()), ("port", &port), ("protocol", protocol)];
        let answer = request.query(&query).bearer_auth(token).send().await;
        let answer = answer.map_err(|error| format!("{url} does not answer: {}", error.without_url()))?;
        let good = answer.status().is_success();
        let body: Value = answer
            .json()
            .await
            .map_err(|_| format!("the answer of {url} is not from a Bulkhead of this version"))?;
        if good {
            Ok(body)
        } else {
            Err(body["detail"].as_str().unwrap_or("the request was denied").to_owned())
        }
    })?;
    let open = answer["open"] == true;
    let agrees = answer["agrees"] != false;
    if output == Output::Json {
        print(&serde_json::to_string_pretty(&answer).map_err(|error| error.to_string())?);
    } else {
        let word = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        let plan = &answer["plan"];
        if open {
            print(&format!("allowed by plan {plan}, through {}", word("through")));
        } else {
            print(&format!("denied by plan {plan}: {}", word("why")));
            if !word("ask").is_empty() {
                print(&format!("to allow it: {}", word("ask")));
            }
        }
        if answer["in_force"] == false {
            print("this plan is not applied yet");
        }
        if probe {
            print(&format!(
                "tried: {}{}",
                word("words"),
                if agrees { "" } else { ". THIS DIFFERS FROM THE PLAN" }
            ));
        }
    }
    Ok(match (open, agrees) {
        (_, false) => ExitCode::from(2),
        (true, true) => ExitCode::SUCCESS,
        (false, true) => ExitCode::FAILURE,
    })
}
