//! Checks names and rights at the registry proxy. Each fault has its own message with the command that fixes
//! it. A message contains only information that its reader already has, never facts about other tenants.

use actix_web::HttpRequest;
use actix_web::http::StatusCode;

use super::front::{FrontDoor, OciError};
use super::token::Claims;
use crate::ids::{RepositoryPath, TenantName};
use crate::images::manifest::shown;

fn invalid(text: String) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "NAME_INVALID", text)
}

/// Returns the command that renames an image so that it can be pushed.
fn retag(door: &FrontDoor, req: &HttpRequest, claims: &Claims, repository: &str) -> String {
    let host = door.host(req);
    let tenant = claims.holder().map_or_else(|| "TENANT".to_owned(), |(_, _, tenant)| tenant.to_string());
    format!(
        "docker tag IMAGE {host}/{tenant}/{repository}:TAG && docker push {host}/{tenant}/{repository}:TAG"
    )
}

/// Splits a repository's name into tenant and path.
pub(super) fn split(
    door: &FrontDoor,
    req: &HttpRequest,
    claims: &Claims,
    name: &str,
) -> Result<(TenantName, RepositoryPath), OciError> {
    let Some((tenant, repository)) = name.split_once('/') else {
        let example = if name.parse::<RepositoryPath>().is_ok() { name } else { "REPOSITORY" };
        return Err(invalid(format!(
            "the name {} has no tenant before it: {}",
            shown(name),
            retag(door, req, claims, example)
        )));
    };
    let tenant = tenant.parse::<TenantName>().map_err(|error| {
        invalid(format!("the first part of {} is not a tenant's name: {error}", shown(name)))
    })?;
    let repository = repository
        .parse::<RepositoryPath>()
        .map_err(|error| invalid(format!("the name {} cannot be used: {error}", shown(name))))?;
    Ok((tenant, repository))
}

/// Explains why no token of this holder can ever allow the request; none if another token could.
pub(super) async fn beyond(
    door: &FrontDoor,
    req: &HttpRequest,
    claims: &Claims,
    (tenant, repository): (&TenantName, &RepositoryPath),
    wanted: &str,
) -> Result<Option<OciError>, OciError> {
    let Some((_, _, own)) = claims.holder() else { return Ok(None) };
    if own != *tenant {
        return Ok(Some(OciError::denied(format!(
            "this credential belongs to the tenant {own} and allows only {own}/..., not {tenant}/{repository}: {}",
            retag(door, req, claims, repository.as_str())
        ))));
    }
    if wanted == "push" && !door.may_push_at_all(claims).await? {
        return Ok(Some(OciError::denied(format!(
            "this credential may pull and not push or delete; create one that may push: POST /api/v1/tenants/{own}/robots \
             {{\"name\": \"ci\", \"push\": true}}, then docker login -u {own}+ci {}",
            door.host(req)
        ))));
    }
    Ok(None)
}
