//! Logs over the API: relayed from the driver, with control characters escaped.

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Deserialize;
use sqlx::PgPool;

use super::api::AppPath;
use super::store;
use crate::access::extract::still_may;
use crate::access::turns::Turns;
use crate::access::{Means, ReadTenant, TenantScope};
use crate::db;
use crate::driver::{Driver, LogLine, LogQuery, LogStream, LogStreamName};
use crate::error::Error;
use crate::fault::plain;
use crate::http::asked::Query;
use crate::ids::TenantName;

/// `?instance=&tail=&follow=`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    instance: Option<u32>,
    #[serde(default = "hundred")]
    tail: u32,
    #[serde(default)]
    follow: bool,
}

fn hundred() -> u32 {
    100
}

/// Returns the text without characters that a terminal would obey. Control characters, and characters that
/// change the direction of writing, are shown as their code.
#[must_use]
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push('\t'),
            c if plain(c) == c => out.push(c),
            c => out.extend(c.escape_unicode()),
        }
    }
    out
}

/// Formats one line as plain text. The platform's time and stream come first and the app's text last, so an app
/// cannot forge them.
#[must_use]
pub fn line_for_people(line: &LogLine) -> String {
    let stream = match line.stream {
        LogStreamName::Stdout => "out",
        LogStreamName::Stderr => "err",
        LogStreamName::Platform => "***",
    };
    let at = line.at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    format!("{at} {} {stream} {}\n", line.instance, clean(&line.text))
}

/// GET /api/v1/tenants/{tenant}/apps/{app}/logs. Answers plain text lines, or one JSON object a line for
/// `Accept: application/x-ndjson`.
pub async fn get_logs(
    scope: TenantScope<ReadTenant>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    driver: web::Data<dyn Driver>,
    path: web::Path<AppPath>,
    query: Query<LogsQuery>,
    turns: web::Data<Turns>,
) -> Result<HttpResponse, Error> {
    let room = turns.stream(&scope.actor, Some(&scope.tenant))?;
    if !(1..=10_000).contains(&query.tail) {
        return Err(Error::Malformed("tail is 1 to 10000".into()));
    }
    let mut conn = db::begin(&pool, scope.tenant.id).await?;
    let app = store::find_app(&mut conn, scope.tenant.id, &path.name()?).await?.ok_or(Error::NotFound)?;
    drop(conn);
    let lines = driver
        .logs(&LogQuery {
            tenant: scope.tenant.name.clone(),
            app: app.name,
            app_id: app.id,
            instance: query.instance,
            tail: query.tail,
            follow: query.follow,
        })
        .await
        .map_err(unavailable)?;
    let json = req
        .headers()
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/x-ndjson"));
    let body = watched(lines, pool.get_ref().clone(), (scope.actor.means, scope.tenant.name));
    let body = body.map(move |line| {
        let _held = &room;
        match line {
            Ok(line) if json => {
                let mut text = serde_json::to_vec(&line).map_err(Error::internal)?;
                text.push(b'\n');
                Ok(Bytes::from(text))
            }
            Ok(line) => Ok(Bytes::from(line_for_people(&line))),
            Err(error) => Err(unavailable(error)),
        }
    });
    let kind = if json { "application/x-ndjson" } else { "text/plain; charset=utf-8" };
    Ok(HttpResponse::Ok().content_type(kind).streaming(body))
}

/// How often the access of a log's reader is checked again.
const AGAIN: Duration = Duration::from_secs(4);

/// Passes the lines on while the reader may read them. The stream ends when the session ends, the token or the
/// role is revoked, or the tenant is suspended or offboarded.
fn watched(
    lines: LogStream,
    pool: PgPool,
    (means, tenant): (Means, TenantName),
) -> impl futures_util::Stream<Item = Result<LogLine, crate::driver::Error>> {
    let first = tokio::time::Instant::now() + AGAIN;
    let tick = tokio::time::interval_at(first, AGAIN);
    futures_util::stream::unfold(
        (lines, tick, pool, means, tenant),
        |(mut lines, mut tick, pool, means, tenant)| async move {
            loop {
                tokio::select! {
                    line = lines.next() => return line.map(|line| (line, (lines, tick, pool, means, tenant))),
                    _ = tick.tick() => {
                        // A database that is briefly unavailable ends no stream.
                        if matches!(still_may::<ReadTenant>(&pool, &means, &tenant).await, Ok(false)) {
                            return None;
                        }
                    }
                }
            }
        },
    )
}

fn unavailable(error: crate::driver::Error) -> Error {
    tracing::warn!(%error, "logs cannot be read");
    Error::Unavailable("the logs cannot be read right now".into(), Duration::from_secs(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        assert_eq!(clean("a\x1b[2Jb\r\nc\u{202e}d\te"), "a\\u{1b}[2Jb\\u{d}\\u{a}c\\u{202e}d\te");
    }

    #[test]
    fn a_forged_time_stands_behind_the_real_one() {
        let line = LogLine {
            instance: 2,
            at: time::OffsetDateTime::UNIX_EPOCH,
            stream: LogStreamName::Stdout,
            text: "2099-01-01T00:00:00Z 1 *** all is well".into(),
        };
        assert_eq!(
            line_for_people(&line),
            "1970-01-01T00:00:00Z 2 out 2099-01-01T00:00:00Z 1 *** all is well\n"
        );
    }
}
