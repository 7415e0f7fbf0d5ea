//! Chat models behind HTTP, against a server in this process.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use advtrain::{ChatModel, Endpoint, EndpointSettings, Message, Reply, ReplySettings};
use serde_json::{Value, json};

/// What the server does with one connection.
#[derive(Clone)]
enum Deed {
    Answer(&'static str, &'static str, String),
    /// Reads, and says nothing for a while.
    Sleep(Duration),
    /// Promises more bytes than it sends.
    Cut,
}

fn said(text: &str) -> Deed {
    Deed::Answer(
        "200 OK",
        "",
        json!({ "choices": [{ "message": { "role": "assistant", "content": text } }] }).to_string(),
    )
}

fn status(status: &'static str, headers: &'static str) -> Deed {
    Deed::Answer(status, headers, r#"{"error": "no"}"#.into())
}

/// A request: its head and body.
type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// Serves one deed per connection; gives the address and what was asked.
fn serve(deeds: Vec<Deed>) -> (String, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    let seen = Seen::default();
    let held = seen.clone();
    thread::spawn(move || {
        for (stream, deed) in listener.incoming().zip(deeds) {
            let mut stream = stream.unwrap();
            held.lock().unwrap().push(read(&stream));
            match deed {
                Deed::Answer(status, headers, body) => {
                    let length = body.len();
                    let head =
                        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
                    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
                }
                Deed::Sleep(time) => thread::sleep(time),
                Deed::Cut => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"choi").unwrap(),
            }
        }
    });
    (address, seen)
}

fn read(stream: &TcpStream) -> (String, Value) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        reader.read_line(&mut head).unwrap();
    }
    let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap()];
    reader.read_exact(&mut body).unwrap();
    (head, serde_json::from_slice(&body).unwrap())
}

fn settings() -> EndpointSettings {
    EndpointSettings { retries: 2, first_wait_seconds: 0.01, timeout_seconds: 0.5, ..EndpointSettings::default() }
}

fn endpoint(address: &str, settings: EndpointSettings) -> Endpoint {
    Endpoint::new(address, "judge-1", settings).unwrap()
}

fn conversation() -> Vec<Message> {
    vec![Message::system("s"), Message::user("u")]
}

const DRAWN: ReplySettings = ReplySettings { max_new_tokens: 7, temperature: 0.5, top_p: 0.9, seed: 3 };

fn ask(endpoint: &mut Endpoint) -> advtrain::Result<Reply> {
    Ok(endpoint.replies(&[conversation()], &DRAWN)?.remove(0))
}

/// The replies to as many conversations as there are, one by one, and how many requests reached the server.
fn replies(conversations: usize, deeds: Vec<Deed>) -> (Vec<advtrain::Result<Reply>>, usize) {
    let (address, seen) = serve(deeds);
    let mut endpoint = endpoint(&address, settings());
    let replies = (0..conversations).map(|_| ask(&mut endpoint)).collect();
    let asked = seen.lock().unwrap().len();
    (replies, asked)
}

fn reply(deeds: Vec<Deed>) -> (advtrain::Result<Reply>, usize) {
    let (mut replies, asked) = replies(1, deeds);
    (replies.remove(0), asked)
}

fn error_of(reply: advtrain::Result<Reply>) -> String {
    reply.unwrap_err().to_string()
}

fn failure_of(reply: advtrain::Result<Reply>) -> String {
    reply.unwrap().unwrap_err().0
}

#[test]
fn a_conversation_is_sent_and_its_reply_read() {
    let (address, seen) = serve(vec![said("hello")]);
    // Cargo sets this one for every test.
    let settings = EndpointSettings { key_variable: Some("CARGO_PKG_NAME".into()), ..settings() };
    assert_eq!(ask(&mut endpoint(&address, settings)).unwrap(), Ok("hello".into()));
    let (head, body) = seen.lock().unwrap()[0].clone();
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1"), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer advtrain"), "{head}");
    let messages = json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "u" }]);
    let expected = json!({
        "model": "judge-1", "messages": messages, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3
    });
    assert_eq!(body, expected);
}

#[test]
fn what_changes_nothing_is_not_sent() {
    let (address, seen) = serve(vec![said("hello")]);
    endpoint(&address, settings()).replies(&[conversation()], &ReplySettings::greedy(7)).unwrap();
    let body = seen.lock().unwrap()[0].1.clone();
    assert_eq!((&body["temperature"], body.get("top_p"), body.get("seed")), (&json!(0.0), None, None));
}

#[test]
fn equal_conversations_of_a_call_are_drawn_apart() {
    let (address, seen) = serve(vec![said("one"), said("two"), said("three")]);
    let settings_of = |seed| ReplySettings { seed, ..DRAWN };
    let mut endpoint = endpoint(&address, settings());
    endpoint.replies(&[conversation(), conversation()], &settings_of(5)).unwrap();
    endpoint.replies(&[conversation()], &settings_of(u64::MAX)).unwrap();
    let seeds: Vec<Value> = seen.lock().unwrap().iter().map(|(_, body)| body["seed"].clone()).collect();
    assert_eq!(seeds, [json!(5), json!(6), json!(0x7FFF_FFFF)]);
}

#[test]
fn what_may_pass_is_asked_again() {
    for deed in [status("500 Internal Server Error", ""), status("429 Too Many Requests", ""), Deed::Cut] {
        let (reply, asked) = reply(vec![deed, said("now")]);
        assert_eq!((reply.unwrap(), asked), (Ok("now".into()), 2));
    }
    let slow = Deed::Sleep(Duration::from_secs(2));
    let begin = Instant::now();
    let (reply, _) = reply(vec![slow.clone(), slow.clone(), slow]);
    // The server serves one after the other, and is still asleep; the client does not wait for it.
    assert!(failure_of(reply).contains("asked 3 times"));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn waits_grow_and_are_as_long_as_the_server_says_but_not_longer_than_allowed() {
    let busy = |headers| status("429 Too Many Requests", headers);
    let seconds = |settings, deeds: Vec<Deed>| {
        let (address, _) = serve(deeds);
        let begin = Instant::now();
        ask(&mut endpoint(&address, settings)).unwrap().unwrap();
        begin.elapsed().as_secs_f64()
    };
    let growing = EndpointSettings { first_wait_seconds: 0.2, ..settings() };
    let waited = seconds(growing, vec![busy(""), busy(""), said("now")]);
    assert!(waited >= 0.6, "0.2 and 0.4: {waited}");
    let waited = seconds(settings(), vec![busy("Retry-After: 1\r\n"), said("now")]);
    assert!(waited >= 1.0, "{waited}");
    let growing = EndpointSettings { first_wait_seconds: 0.5, ..settings() };
    let waited = seconds(growing, vec![busy("Retry-After: 0\r\n"), said("now")]);
    assert!(waited >= 0.5, "what the server says makes no wait shorter: {waited}");
    let impatient = EndpointSettings { longest_wait_seconds: 0.1, ..settings() };
    let waited = seconds(impatient, vec![busy("Retry-After: 3600\r\n"), said("now")]);
    assert!((0.1..5.0).contains(&waited), "{waited}");
}

#[test]
fn what_stays_is_told_and_ends_nothing_else() {
    let failing = || status("503 Service Unavailable", "");
    let (replies, asked) = replies(2, vec![failing(), failing(), failing(), said("late")]);
    let [first, second] = <[_; 2]>::try_from(replies).unwrap();
    let why = failure_of(first);
    assert!(why.contains("status 503") && why.contains("asked 3 times"), "{why}");
    assert_eq!((second.unwrap(), asked), (Ok("late".into()), 4));
}

#[test]
fn a_refused_conversation_is_a_failure_once_another_was_taken() {
    let rubbish = Deed::Answer("200 OK", "", "<html>".into());
    let other = Deed::Answer("200 OK", "", "{}".into());
    for (deed, what) in [
        (status("400 Bad Request", ""), r#"status 400: "{\"error\": \"no\"}""#),
        (status("404 Not Found", ""), "status 404"),
        (status("307 Temporary Redirect", "Location: /v2\r\n"), "status 307"),
        (rubbish, "is not JSON: \"<html>\""),
        (other, "has no choices[0].message.content"),
    ] {
        let (replies, asked) = replies(3, vec![said("one"), deed.clone(), said("three")]);
        let [first, second, third] = <[_; 3]>::try_from(replies).unwrap();
        assert_eq!((first.unwrap(), third.unwrap()), (Ok("one".into()), Ok("three".into())));
        let why = failure_of(second);
        assert!(why.contains(what), "{why}");
        assert_eq!(asked, 3, "it is not asked again");
        // Where nothing has been taken yet, nothing else would be.
        let (reply, _) = reply(vec![deed, said("late")]);
        let error = error_of(reply);
        assert!(error.contains("http://127.0.0.1") && error.contains(what), "{error}");
    }
    let (replies, _) = replies(2, vec![said("one"), status("401 Unauthorized", "")]);
    assert!(error_of(replies.into_iter().next_back().unwrap()).contains("status 401"), "a key counts for all");
}

#[test]
fn a_server_that_is_not_there_is_an_error_at_the_third_conversation() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut endpoint = endpoint(&format!("http://{address}"), EndpointSettings { retries: 1, ..settings() });
    for _ in 0..2 {
        assert!(failure_of(ask(&mut endpoint)).contains("asked 2 times"));
    }
    let error = error_of(ask(&mut endpoint));
    assert!(error.contains("3 conversations in a row") && error.contains(&address.to_string()), "{error}");
}

#[test]
fn a_reply_between_silences_makes_the_count_begin_anew() {
    let failing = || status("503 Service Unavailable", "");
    let deeds = vec![failing(), failing(), said("one"), failing(), failing(), said("two")];
    let (address, _) = serve(deeds);
    let mut endpoint = endpoint(&address, EndpointSettings { retries: 0, ..settings() });
    let replied: Vec<bool> = (0..6).map(|_| ask(&mut endpoint).unwrap().is_ok()).collect();
    assert_eq!(replied, [false, false, true, false, false, true]);
}

#[test]
fn speaking_tls_to_a_server_that_does_not_is_an_error_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    let connections = Arc::new(Mutex::new(0));
    let held = connections.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            *held.lock().unwrap() += 1;
            let _ = stream.unwrap().write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let error = error_of(ask(&mut endpoint(&address, settings())));
    assert!(error.contains(&address), "{error}");
    assert_eq!(*connections.lock().unwrap(), 1);
}

#[test]
fn requests_are_capped() {
    let (address, seen) = serve(vec![said("one"), said("two"), said("three")]);
    let mut endpoint = endpoint(&address, EndpointSettings { max_requests: 2, ..settings() });
    assert_eq!(ask(&mut endpoint).unwrap(), Ok("one".into()));
    assert_eq!(ask(&mut endpoint).unwrap(), Ok("two".into()));
    assert!(error_of(ask(&mut endpoint)).contains("endpoint.max_requests = 2"));
    assert_eq!((endpoint.requests(), seen.lock().unwrap().len()), (2, 2));
}

#[test]
fn bad_settings_are_named() {
    let good = settings();
    for (field, settings) in [
        ("endpoint.timeout_seconds", EndpointSettings { timeout_seconds: 0.0, ..good.clone() }),
        ("endpoint.timeout_seconds", EndpointSettings { timeout_seconds: 1e300, ..good.clone() }),
        ("endpoint.retries", EndpointSettings { retries: usize::MAX, ..good.clone() }),
        ("endpoint.longest_wait_seconds", EndpointSettings { longest_wait_seconds: -1.0, ..good.clone() }),
        ("endpoint.first_wait_seconds", EndpointSettings { first_wait_seconds: f64::NAN, ..good.clone() }),
        ("endpoint.max_requests", EndpointSettings { max_requests: 0, ..good.clone() }),
        ("endpoint.key_variable", EndpointSettings { key_variable: Some("NOT_SET_ANYWHERE".into()), ..good.clone() }),
    ] {
        let error = Endpoint::new("http://x", "m", settings).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
    for address in ["x", "http://", "ftp://x", "http://a b", "https://user:secret@x/v1"] {
        let error = Endpoint::new(address, "m", good.clone()).unwrap_err().to_string();
        assert!(error.starts_with("endpoint.base_url") && !error.contains("secret"), "{error}");
    }
    assert!(Endpoint::new("http://x", "", good).unwrap_err().to_string().starts_with("endpoint.model"));
}

#[test]
fn a_key_is_nowhere_to_be_read() {
    let settings = EndpointSettings { key_variable: Some("CARGO_PKG_DESCRIPTION".into()), ..settings() };
    let endpoint = endpoint("http://x/v1", settings);
    let key = env!("CARGO_PKG_DESCRIPTION");
    for shown in [format!("{endpoint:?}"), endpoint.settings().to_string(), endpoint.name()] {
        assert!(!shown.contains(key), "{shown}");
    }
    assert_eq!(endpoint.settings(), json!({ "base_url": "http://x/v1", "model": "judge-1" }));
}
