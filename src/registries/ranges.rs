//! Parses the `Range` of a blob before the registry is asked (RFC 9110, section 14): one range of bytes, or the
//! whole.

use actix_web::HttpRequest;
use actix_web::http::{Method, header};

use crate::ids::Digest;

/// The part of a blob that a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asking {
    /// The whole blob.
    Whole,
    /// From the first to the last byte, inclusive.
    Part(u64, u64),
    /// A range outside the blob.
    Nothing,
}

/// Returns the requested part of a blob of this size.
pub(super) fn of(req: &HttpRequest, digest: &Digest, size: u64) -> Asking {
    let text =
        |name: header::HeaderName| req.headers().get(name).map(|value| value.to_str().unwrap_or_default());
    let Some(range) = text(header::RANGE).filter(|_| *req.method() == Method::GET) else {
        return Asking::Whole;
    };
    // A part of a different version is useless to the client.
    let tag = format!("\"{digest}\"");
    if text(header::IF_RANGE).is_some_and(|wanted| wanted != tag) {
        return Asking::Whole;
    }
    read(range, size)
}

fn read(text: &str, size: u64) -> Asking {
    let Some(range) = text.strip_prefix("bytes=") else { return Asking::Whole };
    let Some((first, last)) = range.split_once('-') else { return Asking::Whole };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    let end = size.saturating_sub(1);
    match (number(first), number(last)) {
        (None, Some(0)) if first.is_empty() => Asking::Nothing,
        (None, Some(_)) if first.is_empty() && size == 0 => Asking::Nothing,
        (None, Some(n)) if first.is_empty() => Asking::Part(size.saturating_sub(n), end),
        (Some(first), _) if (last.is_empty() || number(last).is_some()) && first >= size => Asking::Nothing,
        (Some(first), None) if last.is_empty() => Asking::Part(first, end),
        (Some(first), Some(last)) if first > last => Asking::Nothing,
        (Some(first), Some(last)) => Asking::Part(first, last.min(end)),
        // For several ranges or an invalid range, the whole blob is a valid answer.
        _ => Asking::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_a_part_and_what_is_not_there_is_none() {
        for (text, size, asking) in [
            ("bytes=500-1499", 2048, Asking::Part(500, 1499)),
            ("bytes=500-", 2048, Asking::Part(500, 2047)),
            ("bytes=-500", 2048, Asking::Part(1548, 2047)),
            ("bytes=-5000", 2048, Asking::Part(0, 2047)),
            ("bytes=2000-5000", 2048, Asking::Part(2000, 2047)),
            ("bytes=2000-99999999999999999999999", 2048, Asking::Part(2000, 2047)),
            ("bytes=500-0", 2048, Asking::Nothing),
            ("bytes=5000-10000", 2048, Asking::Nothing),
            ("bytes=2048-", 2048, Asking::Nothing),
            ("bytes=99999999999999999999999-", 2048, Asking::Nothing),
            ("bytes=-0", 2048, Asking::Nothing),
            ("bytes=0-", 0, Asking::Nothing),
            ("bytes=-1", 0, Asking::Nothing),
            ("bytes=0-0", 1, Asking::Part(0, 0)),
            ("bytes=0-1,5-6", 2048, Asking::Whole),
            ("bytes=a-b", 2048, Asking::Whole),
            ("bytes=", 2048, Asking::Whole),
            ("items=0-1", 2048, Asking::Whole),
            ("", 2048, Asking::Whole),
        ] {
            assert_eq!(read(text, size), asking, "{text} of {size}");
        }
    }
}
