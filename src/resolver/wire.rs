//! Reads and writes DNS messages (RFC 1035), as far as the resolver answers them: one question, of class IN, for
//! addresses.

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType, rdata};

use super::ResolverAnswer;

/// The transport of a message, which limits the length of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    /// A datagram.
    Udp,
    /// A stream.
    Tcp,
}

/// A query that can be answered.
#[derive(Debug)]
pub(super) struct DnsQuestion {
    /// The name, in lower case, without the trailing dot.
    pub(super) name: String,
    message: Message,
    query: Query,
}

impl DnsQuestion {
    /// Returns whether the query asks for IPv4 addresses; there are no others.
    pub(super) fn wants_addresses(&self) -> bool {
        self.query.query_type() == RecordType::A
    }
}

/// Reads a message. The error is the refusal to send back, if one is due.
pub(super) fn read(bytes: &[u8]) -> Result<DnsQuestion, Option<Vec<u8>>> {
    let message = Message::from_vec(bytes).map_err(|_| None)?;
    // A response is never answered: two servers that answer each other would never stop.
    if message.metadata.message_type != MessageType::Query {
        return Err(None);
    }
    let refuse = |code| Err(empty(&message, code).to_vec().ok());
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = message.queries.as_slice() else { return refuse(ResponseCode::FormErr) };
    if query.query_class() != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    let name = query.name().to_lowercase().to_ascii();
    let name = name.strip_suffix('.').unwrap_or(&name).to_owned();
    Ok(DnsQuestion { name, query: query.clone(), message })
}

fn empty(message: &Message, code: ResponseCode) -> Message {
    let mut out = Message::response(message.metadata.id, message.metadata.op_code);
    out.metadata.recursion_desired = message.metadata.recursion_desired;
    out.metadata.recursion_available = true;
    out.metadata.response_code = code;
    out.add_queries(message.queries.iter().cloned());
    out
}

/// Returns the message that contains an answer.
pub(super) fn write(asked: &DnsQuestion, answer: &ResolverAnswer, over: Over) -> Option<Vec<u8>> {
    let code = match answer {
        ResolverAnswer::Known { .. } => ResponseCode::NoError,
        ResolverAnswer::Unknown {} => ResponseCode::NXDomain,
        ResolverAnswer::Refused {} => ResponseCode::Refused,
        ResolverAnswer::Outside {} | ResolverAnswer::Failed {} | ResolverAnswer::Gateways { .. } => {
            ResponseCode::ServFail
        }
    };
    let mut out = empty(&asked.message, code);
    if let ResolverAnswer::Known { addresses, ttl } = answer
        && asked.wants_addresses()
    {
        let record =
            |address| Record::from_rdata(asked.query.name().clone(), *ttl, RData::A(rdata::A(address)));
        out.add_answers(addresses.iter().copied().map(record));
    }
    let bytes = out.to_vec().ok()?;
    // An answer that does not fit into a datagram is truncated; the client asks again over TCP.
    if over == Over::Udp && bytes.len() > 512 { out.truncate().to_vec().ok() } else { Some(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Name;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn answered(bytes: &[u8], answer: &ResolverAnswer) -> Message {
        Message::from_vec(&write(&read(bytes).unwrap(), answer, Over::Udp).unwrap()).unwrap()
    }

    #[test]
    fn names_are_answered_with_addresses_or_not_at_all() {
        let asked = question("Kafka.", RecordType::A);
        assert_eq!(read(&asked).unwrap().name, "kafka");
        let known = ResolverAnswer::Known { addresses: vec![Ipv4Addr::new(10, 5, 0, 2)], ttl: 5 };
        let answer = answered(&asked, &known);
        assert_eq!((answer.metadata.id, answer.answers.len(), answer.answers[0].ttl), (7, 1, 5));
        // For another type there is no record, but the name exists.
        let answer = answered(&question("kafka.", RecordType::AAAA), &known);
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
        for (outcome, code) in [
            (ResolverAnswer::Unknown {}, ResponseCode::NXDomain),
            (ResolverAnswer::Refused {}, ResponseCode::Refused),
            (ResolverAnswer::Failed {}, ResponseCode::ServFail),
            (ResolverAnswer::Outside {}, ResponseCode::ServFail),
        ] {
            assert_eq!(answered(&asked, &outcome).metadata.response_code, code);
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_and_says_so() {
        let addresses = (0..60).map(|n| Ipv4Addr::new(45, 1, 1, n)).collect();
        let known = ResolverAnswer::Known { addresses, ttl: 5 };
        let asked = read(&question("many.example.", RecordType::A)).unwrap();
        let short = write(&asked, &known, Over::Udp).unwrap();
        assert!(short.len() <= 512 && Message::from_vec(&short).unwrap().metadata.truncation);
        let whole = write(&asked, &known, Over::Tcp).unwrap();
        assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 60);
    }

    #[test]
    fn an_answer_is_never_answered() {
        let mut message = Message::from_vec(&question("a.", RecordType::A)).unwrap();
        message.metadata.message_type = MessageType::Response;
        assert!(matches!(read(&message.to_vec().unwrap()), Err(None)));
        let none = Message::new(1, MessageType::Query, OpCode::Query).to_vec().unwrap();
        assert!(matches!(read(&none), Err(Some(_))));
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0_usize..12, to in any::<u8>()) {
            let _ = read(&bytes);
            let mut near = question("api.acme.", RecordType::A);
            near[at] = to;
            if let Ok(asked) = read(&near) {
                let _ = write(&asked, &ResolverAnswer::Unknown {}, Over::Udp);
            }
        }
    }
}
