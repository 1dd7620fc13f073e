//! Commands for root on the machine that need the database: tokens, the first admin's link, the audit log.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bulkhead::access::first_admin;
use bulkhead::access::{Authority, PlatformRole, Role, tokens};
use bulkhead::audit::{heads::Heads, verify};
use bulkhead::config::Config;
use bulkhead::db::{self, Login, Within};
use bulkhead::ids::ActorId;
use bulkhead::keys::{KeyPurpose, Keys};

use crate::{Output, TokenCommand, block_on, explain, load, print};

/// Prints a one-time link that creates an admin's account.
pub(crate) fn first_admin(data: &Path, config: Option<PathBuf>) -> Result<(), String> {
    let config = settings(data, config)?;
    let path = block_on(async {
        let pool = connect(&config, Login::Runtime)?;
        first_admin::make_link(&pool).await.map_err(|error| explain(&error))
    })?;
    let own = config.server.external_url.unwrap_or_else(|| format!("http://{}", config.server.listen));
    print(&format!("{own}{path}"));
    Ok(())
}

fn connect(config: &Config, login: Login) -> Result<sqlx::PgPool, String> {
    Ok(db::pool(db::options(&config.database, login).map_err(|error| error.to_string())?, 1))
}

fn settings(data: &Path, config: Option<PathBuf>) -> Result<Config, String> {
    load(&config.unwrap_or_else(|| data.join("serve.toml")))
        .map_err(|error| format!("{error}\nis `bulkhead up` running on this --data?"))
}

pub(crate) fn verify_audit(data: &Path, config: Option<PathBuf>, output: Output) -> Result<ExitCode, String> {
    let config = settings(data, config)?;
    let report = block_on(async {
        let key = Keys::load(&config.access.key).map_err(|error| explain(&error))?.of(KeyPurpose::Audit);
        let heads = Heads::in_file(config.access.audit_heads.clone());
        let pool = connect(&config, Login::Reconciler)?;
        verify::verify(&pool, &key, &heads).await.map_err(|error| explain(&error))
    })?;
    if output == Output::Json {
        print(&serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?);
    } else {
        for finding in &report.findings {
            print(&format!("FAILED  {finding}"));
        }
        print(&format!(
            "{} rows in {} rounds verified; {} too new to be sealed, {} in months that were removed{}",
            report.rows,
            report.rounds,
            report.unsealed,
            report.retired,
            if report.heads { "" } else { "; no heads to compare with: a removed tail would go unnoticed" }
        ));
    }
    Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn create_token(command: TokenCommand) -> Result<(), String> {
    let TokenCommand::Create { admin, auditor: _, tenant, role, name, days, data, config } = command;
    if name.is_empty() || name.chars().count() > 60 || name.chars().any(char::is_control) {
        return Err("--name must have 1 to 60 visible characters".into());
    }
    let role = Role::parse(&role).ok_or("--role must be viewer, deployer or owner")?;
    let config = settings(&data, config)?;
    block_on(async {
        let failed = |error: bulkhead::error::Error| explain(&error);
        let pool = connect(&config, Login::Runtime)?;
        let within = tenant.as_ref().map_or(Within::Platform, Within::Named);
        let mut tx = db::begin(&pool, within)
            .await
            .map_err(|error| format!("the database does not answer: {error}"))?;
        let authority = match &tenant {
            Some(tenant) => {
                let id = bulkhead::tenants::id_of(&mut tx, tenant).await.map_err(failed)?;
                Authority::Tenant(id.ok_or("the tenant does not exist")?, role)
            }
            None if admin => Authority::Platform(PlatformRole::Admin),
            None => Authority::Platform(PlatformRole::Auditor),
        };
        let actor = ActorId::new("root");
        let life = time::Duration::days(days.into());
        let (_, token) =
            tokens::create_as_root(&mut tx, &name, authority, &actor, life).await.map_err(failed)?;
        tx.commit().await.map_err(|error| error.to_string())?;
        print(token.expose());
        Ok(())
    })
}
