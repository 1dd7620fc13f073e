//! The conditions of a change: `If-Match` and `If-None-Match`, compared with the object's generation.

use crate::error::Error;

/// The ETags of one condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tags {
    /// `*`: any object.
    Any,
    /// These generations.
    These(Vec<i64>),
}

impl Tags {
    /// Parses the value of a header: `*`, or ETags such as `"3"`.
    pub fn parse(header: &str, text: &str) -> Result<Self, Error> {
        if text.trim() == "*" {
            return Ok(Self::Any);
        }
        let one = |tag: &str| {
            let tag = tag.trim();
            let bare = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or(tag);
            bare.bytes().all(|b| b.is_ascii_digit()).then(|| bare.parse().ok()).flatten()
        };
        let tags: Option<Vec<i64>> = text.split(',').map(one).collect();
        tags.map(Self::These).ok_or_else(|| {
            Error::Malformed(format!("{header} takes * or the ETag of an answer, unchanged, such as \"3\""))
        })
    }

    fn has(&self, generation: Option<i64>) -> bool {
        match (self, generation) {
            (Self::Any, found) => found.is_some(),
            // Generation 0 stands for an object that does not exist yet.
            (Self::These(tags), found) => tags.contains(&found.unwrap_or(0)),
        }
    }
}

/// The conditions of a change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The object's generation must be one of these.
    pub if_match: Option<Tags>,
    /// The object's generation must be none of these.
    pub if_none_match: Option<Tags>,
}

impl Expected {
    /// Compares the conditions with the object's generation; none if the object does not exist.
    pub fn check(&self, generation: Option<i64>) -> Result<(), Error> {
        let now = generation.unwrap_or(0);
        if self.if_match.as_ref().is_some_and(|tags| !tags.has(generation)) {
            let why = match generation {
                Some(now) => {
                    format!("If-Match failed: the object has changed, its generation is {now}")
                }
                None => "If-Match failed: the object does not exist".to_owned(),
            };
            return Err(Error::PreconditionFailed(now, why));
        }
        if self.if_none_match.as_ref().is_some_and(|tags| tags.has(generation)) {
            let why = format!("If-None-Match failed: the object exists, its generation is {now}");
            return Err(Error::PreconditionFailed(now, why));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(if_match: &str, if_none_match: &str, generation: Option<i64>) -> bool {
        let read = |text: &str| (!text.is_empty()).then(|| Tags::parse("If-Match", text).unwrap());
        Expected { if_match: read(if_match), if_none_match: read(if_none_match) }.check(generation).is_ok()
    }

    #[test]
    fn conditions_hold_as_http_says() {
        for (if_match, if_none_match, generation, right) in [
            ("", "", None, true),
            ("\"3\"", "", Some(3), true),
            ("3", "", Some(3), true),
            ("\"2\", \"3\"", "", Some(3), true),
            ("\"2\"", "", Some(3), false),
            ("*", "", Some(3), true),
            ("*", "", None, false),
            ("\"3\"", "", None, false),
            ("\"0\"", "", None, true),
            ("", "*", None, true),
            ("", "*", Some(1), false),
            ("", "\"3\"", Some(3), false),
            ("", "\"2\"", Some(3), true),
            ("\"3\"", "*", Some(3), false),
        ] {
            assert_eq!(
                holds(if_match, if_none_match, generation),
                right,
                "{if_match} {if_none_match} {generation:?}"
            );
        }
    }

    #[test]
    fn what_is_no_etag_of_ours_is_refused() {
        for text in ["abc", "\"x\"", "W/\"3\"", "", "\"3", "3,", "-1", "*, \"3\"", "99999999999999999999"] {
            assert!(Tags::parse("If-Match", text).is_err(), "{text}");
        }
    }
}
