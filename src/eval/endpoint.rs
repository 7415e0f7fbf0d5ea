//! Chat models behind OpenAI's HTTP interface.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::{Agent, http::Response};

use super::chat_model::{ChatFailure, ChatModel, Reply, ReplySettings};
use crate::{Error, Message, Result};

/// Where a chat model is asked.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `base_url` | | what comes before `/chat/completions` | http or https |
/// | `model` | | the model's name there | |
/// | `key_variable` | none | the environment variable that holds the key | |
/// | `timeout_seconds` | 120 | for one request, from connecting to the last byte | above 0 |
/// | `retries` | 4 | after time-outs, cut connections, and the statuses 408, 429 and 500 to 599 | |
/// | `first_wait_seconds` | 1 | before the first retry, twice as long before each further one, unless the server says how long | at least 0 |
/// | `longest_wait_seconds` | 60 | no wait is longer | at least 0 |
/// | `max_requests` | 10000 | no more are sent, retries included | at least 1 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSettings {
    /// What comes before `/chat/completions`, `https://api.openai.com/v1` for example.
    pub base_url: String,
    /// The model's name there.
    pub model: String,
    /// The environment variable that holds the key; none is sent without.
    #[serde(default)]
    pub key_variable: Option<String>,
    /// For one request.
    #[serde(default = "timeout")]
    pub timeout_seconds: f64,
    /// How often a request is sent again.
    #[serde(default = "retries")]
    pub retries: usize,
    /// Before the first retry.
    #[serde(default = "first_wait")]
    pub first_wait_seconds: f64,
    /// No wait is longer, whatever the server says.
    #[serde(default = "longest_wait")]
    pub longest_wait_seconds: f64,
    /// No more requests are sent.
    #[serde(default = "max_requests")]
    pub max_requests: usize,
}

fn timeout() -> f64 {
    120.0
}

fn retries() -> usize {
    4
}

fn first_wait() -> f64 {
    1.0
}

fn longest_wait() -> f64 {
    60.0
}

fn max_requests() -> usize {
    10_000
}

impl EndpointSettings {
    /// The defaults for a model at an address.
    pub fn new(base_url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            model: model.into(),
            key_variable: None,
            timeout_seconds: timeout(),
            retries: retries(),
            first_wait_seconds: first_wait(),
            longest_wait_seconds: longest_wait(),
            max_requests: max_requests(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if !["http://", "https://"].iter().any(|scheme| self.base_url.starts_with(scheme)) {
            return Err(Error::setting("endpoint.base_url", &self.base_url, "an address with http:// or https://"));
        }
        if self.model.is_empty() {
            return Err(Error::setting("endpoint.model", "\"\"", "the name of a model"));
        }
        if !(self.timeout_seconds > 0.0 && self.timeout_seconds.is_finite()) {
            return Err(Error::setting("endpoint.timeout_seconds", self.timeout_seconds, "above 0"));
        }
        let waits = [("first_wait", self.first_wait_seconds), ("longest_wait", self.longest_wait_seconds)];
        if let Some((name, value)) = waits.into_iter().find(|(_, value)| !(0.0..=86_400.0).contains(value)) {
            return Err(Error::setting(format!("endpoint.{name}_seconds"), value, "from 0 to 86400, a day"));
        }
        if self.max_requests == 0 {
            return Err(Error::setting("endpoint.max_requests", 0, "at least 1"));
        }
        Ok(())
    }
}

/// A chat model behind an OpenAI-compatible HTTP endpoint. Conversations are sent one after the other.
#[derive(Debug)]
pub struct Endpoint {
    settings: EndpointSettings,
    key: Option<String>,
    agent: Agent,
    requests: usize,
}

/// What one request came to.
enum Outcome {
    Said(String),
    /// Asking again may help, in so many seconds if the server said so.
    Again(String, Option<f64>),
    /// It would not.
    Failed(String),
    /// Nor would asking anything else.
    Refused(String),
}

impl Endpoint {
    /// Reads the key from its environment variable; nothing is sent yet.
    ///
    /// # Errors
    /// If a setting is out of range, or the variable is not set.
    pub fn new(settings: EndpointSettings) -> Result<Self> {
        settings.validate()?;
        let key = settings.key_variable.as_ref().map(|name| {
            let allowed = "the name of an environment variable that is set";
            std::env::var(name).map_err(|_| Error::setting("endpoint.key_variable", name, allowed))
        });
        let config = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(settings.timeout_seconds)))
            .http_status_as_error(false);
        Ok(Self { key: key.transpose()?, agent: config.build().into(), settings, requests: 0 })
    }

    /// Requests sent so far.
    pub fn requests(&self) -> usize {
        self.requests
    }

    fn reply(&mut self, messages: &[Message], reply: &ReplySettings) -> Result<Reply> {
        let mut wait = self.settings.first_wait_seconds;
        let mut left = self.settings.retries;
        loop {
            if self.requests >= self.settings.max_requests {
                let most = self.settings.max_requests;
                return Ok(Err(ChatFailure(format!("endpoint.max_requests = {most} requests have been sent"))));
            }
            self.requests += 1;
            let begin = Instant::now();
            match self.ask(messages, reply) {
                Outcome::Said(text) => return Ok(Ok(text)),
                Outcome::Failed(why) => return Ok(Err(ChatFailure(why))),
                Outcome::Refused(why) => {
                    return Err(Error::mismatch(format!("endpoint {}", self.url()), "one that answers", why));
                }
                Outcome::Again(why, _) if left == 0 => {
                    return Ok(Err(ChatFailure(format!("{why} (asked {} times)", self.settings.retries + 1))));
                }
                Outcome::Again(why, told) => {
                    let seconds = told.unwrap_or(wait).min(self.settings.longest_wait_seconds);
                    tracing::info!(why, waited = begin.elapsed().as_secs_f64(), again_in = seconds, "no reply yet");
                    sleep(Duration::from_secs_f64(seconds));
                    wait *= 2.0;
                    left -= 1;
                }
            }
        }
    }

    fn url(&self) -> String {
        format!("{}/chat/completions", self.settings.base_url.trim_end_matches('/'))
    }

    fn ask(&self, messages: &[Message], reply: &ReplySettings) -> Outcome {
        let body = json!({
            "model": self.settings.model, "messages": messages, "max_tokens": reply.max_new_tokens,
            "temperature": reply.temperature, "top_p": reply.top_p, "seed": reply.seed,
        });
        let mut request = self.agent.post(self.url()).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body.to_string()) {
            Ok(response) => response,
            Err(error) => return Outcome::Again(error.to_string(), None),
        };
        let (status, told) = (response.status().as_u16(), retry_after(&response));
        let text = match response.body_mut().read_to_string() {
            Ok(text) => text,
            Err(error) => return Outcome::Again(format!("reading the reply: {error}"), None),
        };
        let failure = || format!("status {status}: {}", beginning(&text));
        match status {
            200..300 => said(&text),
            408 | 429 | 500..600 => Outcome::Again(failure(), told),
            401 | 403 | 404 | 405 => Outcome::Refused(failure()),
            _ => Outcome::Failed(failure()),
        }
    }
}

/// The seconds of a Retry-After header; a date there is not read.
fn retry_after<B>(response: &Response<B>) -> Option<f64> {
    let seconds = response.headers().get("retry-after")?.to_str().ok()?.trim().parse::<f64>().ok()?;
    (seconds >= 0.0).then_some(seconds)
}

fn said(text: &str) -> Outcome {
    let wrong = |what: &str| Outcome::Again(format!("{what}: {}", beginning(text)), None);
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
        self.settings.model.clone()
    }

    fn replies(&mut self, conversations: &[Vec<Message>], settings: &ReplySettings) -> Result<Vec<Reply>> {
        conversations.iter().map(|messages| self.reply(messages, settings)).collect()
    }
}
