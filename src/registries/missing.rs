//! Explains why an image was not found: a tenant prefix, an unknown tag, or an unknown repository. Each is a
//! separate fault with the name that was probably meant.

use super::Reference;
use crate::fault::{Code, Fault, Kind};

/// The tenant's objects that matter for a missing image.
#[derive(Debug, Default)]
pub(super) struct TenantImages {
    /// Its repositories.
    pub(super) repositories: Vec<String>,
    /// Tags of the requested repository, or of the one that was probably meant.
    pub(super) tags: Vec<String>,
    /// Repository that has the requested digest.
    pub(super) elsewhere: Option<String>,
}

/// Maximum number of listed names.
const LISTED: usize = 5;

/// Returns the name that was probably meant: a common beginning, or a small edit distance.
fn nearest<'a>(asked: &str, names: impl IntoIterator<Item = &'a String>) -> Option<&'a str> {
    let asked = asked.to_ascii_lowercase();
    let distance = |name: &str| {
        let lower = name.to_ascii_lowercase();
        let begins = asked.len() >= 2 && (lower.starts_with(&asked) || asked.starts_with(&lower));
        let last = lower.rsplit('/').next() == Some(&*asked) || asked.rsplit('/').next() == Some(&*lower);
        if lower == asked {
            0
        } else if begins || last {
            1
        } else {
            strsim::damerau_levenshtein(&asked, &lower)
        }
    };
    names
        .into_iter()
        .map(|name| (distance(name), name))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, name)| *distance <= 2 && *distance < name.len())
        .map(|(_, name)| name.as_str())
}

fn list(names: &[String]) -> String {
    let more =
        if names.len() > LISTED { format!(", and {} more", names.len() - LISTED) } else { String::new() };
    let shown: Vec<&str> = names.iter().take(LISTED).map(String::as_str).collect();
    format!("{}{more}", shown.join(", "))
}

fn written(repository: &str, reference: &Reference) -> String {
    match reference {
        Reference::Tag(tag) => format!("{repository}:{tag}"),
        Reference::Digest(digest) => format!("{repository}@{digest}"),
    }
}

/// Returns the repository that was probably meant: without the tenant prefix, or the nearest name.
pub(super) fn meant<'a>(tenant: &str, repository: &'a str, repositories: &'a [String]) -> Option<&'a str> {
    let bare = repository.strip_prefix(tenant).and_then(|rest| rest.strip_prefix('/'));
    let bare = bare.filter(|bare| repositories.iter().any(|known| known == bare));
    bare.or_else(|| nearest(repository, repositories))
}

/// Builds the fault for a missing image.
pub(super) fn explain(tenant: &str, repository: &str, reference: &Reference, known: &TenantImages) -> Fault {
    let fault = |code, message: String| Fault::new(Code(code), Kind::Conflict, "image", message);
    if known.repositories.iter().any(|own| own == repository) {
        return match reference {
            Reference::Tag(tag) => {
                let fault = fault(200, format!("the repository {repository} has no such tag"))
                    .because("a release runs what was pushed, and the tag latest is not implied");
                match nearest(tag.as_str(), &known.tags) {
                    Some(near) => fault.instead(format!("did you mean {repository}:{near}?")),
                    None if known.tags.is_empty() => {
                        fault.instead(format!("push it: no tag of {repository} is left"))
                    }
                    None => fault.instead(format!("push it, or write one of: {}", list(&known.tags))),
                }
            }
            Reference::Digest(_) => {
                let fault =
                    fault(200, format!("the repository {repository} has no manifest with this digest"));
                match &known.elsewhere {
                    Some(place) => fault.instead(format!("write {}", written(place, reference))),
                    None => fault.instead("push it first; GET .../tags lists the digests"),
                }
            }
        };
    }
    if let Some(bare) = repository.strip_prefix(tenant).and_then(|rest| rest.strip_prefix('/')) {
        let there = known.repositories.iter().any(|own| own == bare);
        let message = "the image begins with the tenant's name".to_owned();
        let fault = fault(220, message)
            .because("images come from the tenant's own project, so the tenant is implied");
        return if there {
            fault.instead(format!("leave the tenant out: {}", written(bare, reference)))
        } else {
            fault.instead("leave the tenant out, as in web:1; GET .../repositories lists the repositories")
        };
    }
    let fault = fault(200, "the tenant's project has no such repository".to_owned());
    match (meant(tenant, repository, &known.repositories), reference) {
        (Some(near), Reference::Tag(tag)) if known.tags.iter().any(|own| own == tag.as_str()) => {
            fault.instead(format!("did you mean {near}:{tag}?"))
        }
        (Some(near), Reference::Tag(_)) if !known.tags.is_empty() => {
            fault.instead(format!("did you mean {near}? Its tags are: {}", list(&known.tags)))
        }
        (Some(near), _) => fault.instead(format!("did you mean {near}?")),
        (None, _) if known.repositories.is_empty() => {
            fault.instead(format!("push an image first: podman push HOST/{tenant}/REPOSITORY:TAG"))
        }
        (None, _) => fault.instead(format!("push it first, or write one of: {}", list(&known.repositories))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(image: &str, repositories: &[&str], tags: &[&str]) -> (u16, String) {
        let (repository, tag) = image.split_once(':').unwrap();
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let known = TenantImages { repositories: owned(repositories), tags: owned(tags), elsewhere: None };
        let fault = explain("acme", repository, &Reference::Tag(tag.parse().unwrap()), &known);
        (fault.code.0, fault.suggestion.unwrap())
    }

    #[test]
    fn prefix_tag_and_repository_are_three_faults() {
        let all = ["web", "team/api", "worker"];
        for (image, tags, code, instead) in [
            ("acme/web:1", &["1"][..], 220, "leave the tenant out: web:1"),
            ("acme/none:1", &[], 220, "leave the tenant out, as in web:1"),
            ("acme/team/api:1", &["1"], 220, "leave the tenant out: team/api:1"),
            ("web:1.4", &["1.4.2", "2.0"], 200, "did you mean web:1.4.2?"),
            ("web:v2", &["1", "v1"], 200, "did you mean web:v1?"),
            ("web:zzzzzz", &["1", "2"], 200, "push it, or write one of: 1, 2"),
            ("web:1", &[], 200, "push it: no tag of web is left"),
            ("wbe:1", &["1"], 200, "did you mean web:1?"),
            ("wbe:7", &["1", "2"], 200, "did you mean web? Its tags are: 1, 2"),
            ("api:1", &["1"], 200, "did you mean team/api:1?"),
            ("library/worker:1", &["1"], 200, "did you mean worker:1?"),
            ("postgres:16", &[], 200, "push it first, or write one of: web, team/api, worker"),
        ] {
            let (found, told) = told(image, &all, tags);
            assert!(found == code && told.starts_with(instead), "{image}: {found} {told}");
        }
        let (code, told) = told("web:1", &[], &[]);
        assert!(code == 200 && told.contains("podman push HOST/acme/"), "{told}");
    }

    #[test]
    fn a_digest_is_looked_for_elsewhere() {
        let digest = crate::ids::Digest::of(b"x");
        let known =
            TenantImages { repositories: vec!["web".into()], tags: vec![], elsewhere: Some("api".into()) };
        let fault = explain("acme", "web", &Reference::Digest(digest.clone()), &known);
        assert_eq!(fault.suggestion, Some(format!("write api@{digest}")));
    }

    #[test]
    fn long_lists_are_cut() {
        let many: Vec<String> = (0..9).map(|n| format!("t{n}")).collect();
        assert_eq!(list(&many), "t0, t1, t2, t3, t4, and 4 more");
    }
}
