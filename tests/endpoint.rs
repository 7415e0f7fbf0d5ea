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

fn settings(address: &str) -> EndpointSettings {
    EndpointSettings {
        retries: 2,
        first_wait_seconds: 0.01,
        timeout_seconds: 0.5,
        ..EndpointSettings::new(address, "judge-1")
    }
}

fn ask(endpoint: &mut Endpoint) -> advtrain::Result<Reply> {
    let conversation = vec![Message::system("s"), Message::user("u")];
    let settings = ReplySettings { max_new_tokens: 7, temperature: 0.5, top_p: 0.9, seed: 3 };
    Ok(endpoint.replies(&[conversation], &settings)?.remove(0))
}

fn replies(deeds: Vec<Deed>) -> (Reply, usize) {
    let (address, seen) = serve(deeds);
    let reply = ask(&mut Endpoint::new(settings(&address)).unwrap()).unwrap();
    let asked = seen.lock().unwrap().len();
    (reply, asked)
}

#[test]
fn a_conversation_is_sent_and_its_reply_read() {
    let (address, seen) = serve(vec![said("hello")]);
    // Cargo sets this one for every test.
    let settings = EndpointSettings { key_variable: Some("CARGO_PKG_NAME".into()), ..settings(&address) };
    assert_eq!(ask(&mut Endpoint::new(settings).unwrap()).unwrap(), Ok("hello".into()));
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
fn what_may_pass_is_asked_again() {
    let rubbish = Deed::Answer("200 OK", "", "<html>".into());
    let other = Deed::Answer("200 OK", "", "{}".into());
    for deed in
        [status("500 Internal Server Error", ""), status("429 Too Many Requests", ""), Deed::Cut, rubbish, other]
    {
        assert_eq!(replies(vec![deed, said("now")]), (Ok("now".into()), 2));
    }
    let slow = Deed::Sleep(Duration::from_secs(2));
    let begin = Instant::now();
    let (reply, _) = replies(vec![slow.clone(), slow.clone(), slow]);
    // The server serves one after the other, and is still asleep; the client does not wait for it.
    assert!(reply.unwrap_err().0.contains("asked 3 times"));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_server_says_how_long_to_wait() {
    let begin = Instant::now();
    let (reply, asked) = replies(vec![status("429 Too Many Requests", "Retry-After: 1\r\n"), said("now")]);
    assert_eq!((reply, asked), (Ok("now".into()), 2));
    assert!(begin.elapsed() >= Duration::from_secs(1));
}

#[test]
fn what_stays_is_told_and_ends_nothing_else() {
    let failing = || status("503 Service Unavailable", "");
    let (reply, asked) = replies(vec![failing(), failing(), failing(), said("late")]);
    let why = reply.unwrap_err().0;
    assert!(why.contains("status 503") && why.contains("asked 3 times"), "{why}");
    assert_eq!(asked, 3);
    let (reply, asked) = replies(vec![status("400 Bad Request", ""), said("late")]);
    assert!(reply.unwrap_err().0.contains("status 400"));
    assert_eq!(asked, 1);
}

#[test]
fn what_no_other_conversation_would_get_either_is_an_error() {
    let (address, _) = serve(vec![status("401 Unauthorized", "")]);
    let error = ask(&mut Endpoint::new(settings(&address)).unwrap()).unwrap_err().to_string();
    assert!(error.contains(&address) && error.contains("status 401"), "{error}");
}

#[test]
fn requests_are_capped() {
    let (address, seen) = serve(vec![said("one"), said("two"), said("three")]);
    let mut endpoint = Endpoint::new(EndpointSettings { max_requests: 2, ..settings(&address) }).unwrap();
    assert_eq!(ask(&mut endpoint).unwrap(), Ok("one".into()));
    assert_eq!(ask(&mut endpoint).unwrap(), Ok("two".into()));
    assert!(ask(&mut endpoint).unwrap().unwrap_err().0.contains("max_requests = 2"));
    assert_eq!((endpoint.requests(), seen.lock().unwrap().len()), (2, 2));
}

#[test]
fn a_server_that_is_not_there_is_a_failure() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let reply = ask(&mut Endpoint::new(settings(&format!("http://{address}"))).unwrap()).unwrap();
    assert!(reply.unwrap_err().0.contains("asked 3 times"));
}

#[test]
fn bad_settings_are_named() {
    let good = settings("http://x");
    for (field, settings) in [
        ("endpoint.base_url", EndpointSettings { base_url: "x".into(), ..good.clone() }),
        ("endpoint.model", EndpointSettings { model: String::new(), ..good.clone() }),
        ("endpoint.timeout_seconds", EndpointSettings { timeout_seconds: 0.0, ..good.clone() }),
        ("endpoint.longest_wait_seconds", EndpointSettings { longest_wait_seconds: -1.0, ..good.clone() }),
        ("endpoint.max_requests", EndpointSettings { max_requests: 0, ..good.clone() }),
        ("endpoint.key_variable", EndpointSettings { key_variable: Some("NOT_SET_ANYWHERE".into()), ..good }),
    ] {
        let error = Endpoint::new(settings).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
