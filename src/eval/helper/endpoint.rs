//! Chat models behind OpenAI's HTTP interface.

use std::{
    io,
    thread::sleep,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::{
    Agent,
    http::{HeaderValue, Response, Uri},
};

use super::{
    chat_model::{ChatFailure, ChatModel, Reply, ReplySettings},
    guard::CONTROL_TEXTS,
};
use crate::{Error, Message, Result};

/// How a chat model behind HTTP is asked.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `key_variable` | none | the environment variable that holds the key | one that is set |
/// | `timeout_seconds` | 120 | for one request, from connecting to the last byte | above 0, at most 86400 |
/// | `retries` | 4 | after time-outs, cut connections, and the statuses 408, 429 and 500 to 599 | at most 100 |
/// | `first_wait_seconds` | 1 | before the first retry; then doubled, or longer if the server says so | 0 to 86400 |
/// | `longest_wait_seconds` | 60 | no wait is longer | 0 to 86400 |
/// | `max_requests` | 10000 | no more are sent, retries included | at least 1 |
/// | `marks` | [`CONTROL_TEXTS`] | what the model takes for the frame of a conversation ([`ChatModel::marks`]) | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointSettings {
    /// The environment variable that holds the key; none is sent without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_variable: Option<String>,
    /// For one request.
    pub timeout_seconds: f64,
    /// How often a request is sent again.
    pub retries: usize,
    /// Before the first retry.
    pub first_wait_seconds: f64,
    /// No wait is longer, whatever the server says.
    pub longest_wait_seconds: f64,
    /// No more requests are sent.
    pub max_requests: usize,
    /// Texts that the model takes for the frame of a conversation.
    pub marks: Vec<String>,
}

impl Default for EndpointSettings {
    fn default() -> Self {
        Self {
            key_variable: None,
            timeout_seconds: 120.0,
            retries: 4,
            first_wait_seconds: 1.0,
            longest_wait_seconds: 60.0,
            max_requests: 10_000,
            marks: CONTROL_TEXTS.iter().map(|text| text.to_string()).collect(),
        }
    }
}

const DAY: f64 = 86_400.0;

impl EndpointSettings {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if !(self.timeout_seconds > 0.0 && self.timeout_seconds <= DAY) {
            let allowed = "above 0 and at most 86400, a day";
            return Err(Error::setting("endpoint.timeout_seconds", self.timeout_seconds, allowed));
        }
        if self.retries > 100 {
            return Err(Error::setting("endpoint.retries", self.retries, "at most 100"));
        }
        let waits = [("first_wait", self.first_wait_seconds), ("longest_wait", self.longest_wait_seconds)];
        if let Some((name, value)) = waits.into_iter().find(|(_, value)| !(0.0..=DAY).contains(value)) {
            return Err(Error::setting(format!("endpoint.{name}_seconds"), value, "from 0 to 86400, a day"));
        }
        Error::check_count("endpoint.max_requests", self.max_requests)?;
        Ok(())
    }

    /// What is sent as the key, with the word in front that says so.
    fn authorization(&self) -> Result<Option<HeaderValue>> {
        let Some(name) = &self.key_variable else { return Ok(None) };
        let wrong = |allowed: &str| Error::setting("endpoint.key_variable", name, allowed);
        let key = std::env::var(name).map_err(|_| wrong("the name of an environment variable that is set"))?;
        let sent = HeaderValue::from_str(&format!("Bearer {key}")).ok().filter(|_| !key.is_empty());
        let mut sent = sent.ok_or_else(|| wrong("of a variable that holds a key: visible letters and no line end"))?;
        sent.set_sensitive(true);
        Ok(Some(sent))
    }
}

/// A chat model behind an OpenAI-compatible HTTP endpoint. Conversations are sent one after the other.
///
/// A conversation that the server refuses, or that gets nothing in all its retries, has no reply. What no other
/// conversation would get past is an error: an address, certificate or key that does not work, any refusal before the
/// first reply, three conversations in a row that got nothing, and the cap on requests.
pub struct Endpoint {
    url: String,
    base_url: String,
    model: String,
    settings: EndpointSettings,
    authorization: Option<HeaderValue>,
    agent: Agent,
    requests: usize,
    /// Whether a conversation has ever got a reply.
    has_replied: bool,
    /// Conversations in a row that got nothing in all their retries.
    silent: usize,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("base_url", &self.base_url)
            .field("model", &self.model)
            .field("settings", &self.settings)
            .field("requests", &self.requests)
            .finish_non_exhaustive()
    }
}

/// So many conversations in a row without an answer from the server are taken for the end of it.
const SILENT: usize = 3;

/// What one request came to.
enum Outcome {
    Said(String),
    /// Asking again may help, in so many seconds at the earliest if the server said so.
    Again(String, Option<f64>),
    /// The server does not take this conversation.
    Failed(String),
    /// Nor would anything else be taken.
    Refused(String),
}

impl Endpoint {
    /// A model at an address, which is what comes before `/chat/completions` (`https://api.openai.com/v1` for example).
    /// Reads the key from its environment variable; nothing is sent yet.
    ///
    /// # Errors
    /// If the address is none, the model has no name, a setting is out of range, or the variable holds no key.
    pub fn new(base_url: impl Into<String>, model: impl Into<String>, settings: EndpointSettings) -> Result<Self> {
        let (base_url, model) = (base_url.into(), model.into());
        check_address(&base_url)?;
        if model.is_empty() {
            return Err(Error::setting("endpoint.model", "\"\"", "the name of a model"));
        }
        settings.validate()?;
        // A redirected POST would lose its body, or take the key to another host.
        let config = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(settings.timeout_seconds)))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false);
        Ok(Self {
            url: format!("{}/chat/completions", base_url.trim_end_matches('/')),
            base_url,
            model,
            authorization: settings.authorization()?,
            settings,
            agent: config.build().into(),
            requests: 0,
            has_replied: false,
            silent: 0,
        })
    }

    /// Requests sent so far.
    pub fn requests(&self) -> usize {
        self.requests
    }

    fn reply(&mut self, messages: &[Message], reply: &ReplySettings) -> Result<Reply> {
        match self.outcome(messages, reply)? {
            Outcome::Said(text) => {
                (self.has_replied, self.silent) = (true, 0);
                Ok(Ok(text))
            }
            Outcome::Failed(why) if self.has_replied => {
                self.silent = 0;
                Ok(Err(ChatFailure(why)))
            }
            Outcome::Again(why, _) if self.silent + 1 < SILENT => {
                self.silent += 1;
                Ok(Err(ChatFailure(format!("{why} (asked {} times)", self.settings.retries + 1))))
            }
            Outcome::Again(why, _) => {
                Err(self.useless(format!("nothing for {SILENT} conversations in a row, at last {why}")))
            }
            Outcome::Failed(why) | Outcome::Refused(why) => Err(self.useless(why)),
        }
    }

    fn useless(&self, why: String) -> Error {
        Error::mismatch(format!("endpoint {}", self.url), "one that answers", why)
    }

    /// What the last request for a conversation came to.
    fn outcome(&mut self, messages: &[Message], reply: &ReplySettings) -> Result<Outcome> {
        let mut wait = self.settings.first_wait_seconds;
        let mut left = self.settings.retries;
        loop {
            let begin = Instant::now();
            let (why, told) = match self.ask(messages, reply)? {
                Outcome::Again(why, told) if left > 0 => (why, told),
                outcome => return Ok(outcome),
            };
            let seconds = told.unwrap_or_default().max(wait).min(self.settings.longest_wait_seconds);
            tracing::info!(why, waited = begin.elapsed().as_secs_f64(), again_in = seconds, "no reply yet");
            sleep(Duration::from_secs_f64(seconds));
            wait *= 2.0;
            left -= 1;
        }
    }

    fn ask(&mut self, messages: &[Message], reply: &ReplySettings) -> Result<Outcome> {
        let most = self.settings.max_requests;
        if self.requests >= most {
            let allowed = "more to go on: so many requests have been sent, retries included";
            return Err(Error::setting("endpoint.max_requests", most, allowed));
        }
        self.requests += 1;
        let mut request = self.agent.post(&self.url).header("Content-Type", "application/json");
        if let Some(key) = &self.authorization {
            request = request.header("Authorization", key);
        }
        let mut response = match request.send(self.body(messages, reply).to_string()) {
            Ok(response) => response,
            Err(error) if may_pass(&error) => return Ok(Outcome::Again(error.to_string(), None)),
            Err(error) => return Ok(Outcome::Refused(error.to_string())),
        };
        let (status, told) = (response.status().as_u16(), retry_after(&response));
        let text = match response.body_mut().read_to_string() {
            Ok(text) => text,
            Err(error) => {
                let why = format!("reading the reply: {error}");
                return Ok(if may_pass(&error) { Outcome::Again(why, None) } else { Outcome::Failed(why) });
            }
        };
        let failure = || format!("status {status}: {}", beginning(&text));
        Ok(match status {
            200..300 => said(&text),
            408 | 429 | 500..600 => Outcome::Again(failure(), told),
            401 => Outcome::Refused(failure()),
            _ => Outcome::Failed(failure()),
        })
    }

    fn body(&self, messages: &[Message], reply: &ReplySettings) -> Value {
        let mut body = json!({
            "model": self.model, "messages": messages, "max_tokens": reply.max_new_tokens,
            "temperature": reply.temperature,
        });
        // Not every server takes these, so they are sent where they change something.
        if reply.top_p < 1.0 {
            body["top_p"] = json!(reply.top_p);
        }
        if reply.temperature > 0.0 {
            body["seed"] = json!(reply.seed);
        }
        body
    }
}

/// An address without a password, which would end up in records.
fn check_address(base_url: &str) -> Result<()> {
    let address = base_url.parse::<Uri>().ok();
    let fits = |address: &Uri| {
        let scheme = matches!(address.scheme_str(), Some("http" | "https"));
        scheme && address.host().is_some() && !address.authority().is_some_and(|part| part.as_str().contains('@'))
    };
    if address.as_ref().is_some_and(fits) {
        return Ok(());
    }
    let shown = if base_url.contains('@') { "an address with a password" } else { base_url };
    Err(Error::setting("endpoint.base_url", shown, "an address with http:// or https://, without user and password"))
}

/// Whether the same request may get through another time: the way there failed, and not what was sent.
fn may_pass(error: &ureq::Error) -> bool {
    match error {
        // How a certificate that does not fit arrives here.
        ureq::Error::Io(error) => !matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput),
        ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_)
        | ureq::Error::BodyStalled => true,
        _ => false,
    }
}

/// The seconds of a Retry-After header; a date there is not read.
fn retry_after<B>(response: &Response<B>) -> Option<f64> {
    let seconds = response.headers().get("retry-after")?.to_str().ok()?.trim().parse::<f64>().ok()?;
    (seconds >= 0.0).then_some(seconds)
}

fn said(text: &str) -> Outcome {
    let wrong = |what: &str| Outcome::Failed(format!("{what}: {}", beginning(text)));
    let Ok(json) = serde_json::from_str::<Value>(text) else { return wrong("the reply is not JSON") };
    match &json["choices"][0]["message"]["content"] {
        Value::String(content) => Outcome::Said(content.clone()),
        // How OpenAI's interface says that there are no words.
        Value::Null if json["choices"][0]["message"].is_object() => Outcome::Said(String::new()),
        _ => wrong("the reply has no choices[0].message.content"),
    }
}

/// Enough of a text to recognise it.
fn beginning(text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    if short.len() < text.len() { format!("{short:?} …") } else { format!("{short:?}") }
}

impl ChatModel for Endpoint {
    fn name(&self) -> String {
        self.model.clone()
    }

    fn settings(&self) -> Value {
        json!({ "base_url": self.base_url, "model": self.model })
    }

    fn marks(&self) -> Vec<String> {
        self.settings.marks.clone()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        let of_place = |(place, messages): (usize, &Vec<Message>)| {
            // Equal conversations get different replies; servers take numbers of 31 bits.
            let seed = settings.seed.wrapping_add(place as u64) & 0x7FFF_FFFF;
            self.reply(messages, &ReplySettings { seed, ..settings.clone() })
        };
        conversations.iter().enumerate().map(of_place).collect()
    }
}
