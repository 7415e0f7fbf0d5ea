//! One search of PAIR: its streams, step by step.

use std::{ops::ControlFlow, time::Instant};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{
    Pair,
    dialogue::{ANSWER, SCORE, Stream, TASK, feedback, instructions, score},
    reply::prompt_of,
};
use crate::{
    Answered, Attempt, Case, Error, Generation, Message, Outcome, Reply, ReplySettings, Result, Subject, Trajectory,
    Verdict, Watch, answers,
    digest::generator,
    eval::{
        helper::{chat_model::replies_of, guard::Frame},
        judge::verdicts_of,
    },
};

/// A prompt of one stream.
struct Prompt {
    stream: usize,
    /// The attacker's words around it.
    reply: String,
    /// What the attacked model is asked.
    messages: Vec<Message>,
}

/// One attack on one case.
pub(super) struct Search<'s, 'a> {
    attack: &'s mut Pair<'a>,
    subject: &'s Subject<'s>,
    case: &'s Case,
    /// How the attacked model answers.
    generation: Generation,
    /// What an answer must not look like to the attacker.
    frame: Frame,
    random: ChaCha8Rng,
    streams: Vec<Stream>,
    trajectory: Trajectory,
    best: Option<f64>,
    /// Why a stream had no prompt, the last time.
    why: String,
}

impl<'s, 'a> Search<'s, 'a> {
    pub(super) fn new(attack: &'s mut Pair<'a>, subject: &'s Subject<'s>, case: &'s Case) -> Self {
        let streams = (0..attack.settings.streams)
            .map(|stream| Stream { instructions: Message::user(instructions(stream, case)), exchanges: Vec::new() });
        let own = subject.generation();
        let max_new_tokens = own.max_new_tokens.min(attack.settings.target_tokens);
        let marks = attack.attacker.marks().into_iter().chain([ANSWER, TASK, SCORE].map(String::from));
        Self {
            generation: Generation { max_new_tokens, ..own.clone() },
            frame: Frame::new(marks),
            random: generator(attack.settings.seed, "pair", &case.id),
            streams: streams.collect(),
            trajectory: Trajectory::default(),
            best: None,
            why: String::new(),
            attack,
            subject,
            case,
        }
    }

    pub(super) fn run(mut self, watch: &mut Watch) -> Result<Outcome> {
        let begin = Instant::now();
        let settings = self.attack.settings.clone();
        for step in 0..settings.steps {
            let mut stops = || watch(step, settings.steps).is_break();
            if self.step(step, &mut stops)?.is_break() {
                return Ok(Outcome::Stopped);
            }
            if self.best.is_some_and(|best| best >= settings.stop_score) {
                break;
            }
        }
        if self.trajectory.attempts.is_empty() {
            let found = format!("none in {} replies; of the last one: {}", self.trajectory.cost.replies, self.why);
            return Err(Error::mismatch("prompts of the attacking model", "at least one", found));
        }
        self.trajectory.cost.seconds = begin.elapsed().as_secs_f64();
        Ok(Outcome::Done(self.trajectory))
    }

    /// One prompt of every stream that writes one. `stops` is asked whenever models have been.
    fn step(&mut self, step: usize, stops: &mut dyn FnMut() -> bool) -> Result<ControlFlow<()>> {
        let Some(prompts) = self.prompts(stops)? else { return Ok(ControlFlow::Break(())) };
        for prompts in prompts.chunks(self.subject.rows()) {
            if stops() {
                return Ok(ControlFlow::Break(()));
            }
            let answers = self.answers(prompts)?;
            let verdicts = self.verdicts(&answers)?;
            for (prompt, (answer, verdict)) in prompts.iter().zip(answers.into_iter().zip(&verdicts)) {
                self.keep(step, prompt, answer, verdict);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The prompts of those streams whose attacker writes one; `None` if it was stopped.
    fn prompts(&mut self, stops: &mut dyn FnMut() -> bool) -> Result<Option<Vec<Prompt>>> {
        let mut prompts = Vec::new();
        let mut open: Vec<usize> = (0..self.streams.len()).collect();
        for _ in 0..=self.attack.settings.retries {
            let mut again = Vec::new();
            for streams in open.chunks(self.subject.rows()) {
                if stops() {
                    return Ok(None);
                }
                self.ask(streams, &mut prompts, &mut again)?;
            }
            open = again;
        }
        prompts.sort_by_key(|prompt: &Prompt| prompt.stream);
        Ok(Some(prompts))
    }

    /// Asks the attacker on behalf of these streams. A stream whose reply is not the JSON asked for may ask again; one
    /// that got no reply, or whose prompt cannot be asked, sits out the step.
    fn ask(&mut self, streams: &[usize], prompts: &mut Vec<Prompt>, again: &mut Vec<usize>) -> Result<()> {
        let settings = &self.attack.settings;
        let conversations: Vec<_> =
            streams.iter().map(|stream| self.streams[*stream].conversation(settings.kept)).collect();
        let reply = ReplySettings {
            max_new_tokens: settings.attacker_tokens,
            temperature: settings.temperature,
            top_p: 1.0,
            // As many bits as every endpoint takes.
            seed: self.random.random::<u32>().into(),
        };
        self.trajectory.cost.replies += streams.len();
        let replies = replies_of(&mut *self.attack.attacker, &conversations, &reply)?;
        for (stream, reply) in streams.iter().copied().zip(replies) {
            match self.read(stream, reply) {
                Ok(prompt) => prompts.push(prompt),
                Err((why, may_ask_again)) => {
                    self.why = why;
                    again.extend(may_ask_again.then_some(stream));
                }
            }
        }
        Ok(())
    }

    /// The prompt of a reply; without one, why, and whether the stream may ask again.
    fn read(&self, stream: usize, reply: Reply) -> std::result::Result<Prompt, (String, bool)> {
        let reply = reply.map_err(|failure| (failure.to_string(), false))?;
        let Some(prompt) = prompt_of(&reply) else {
            let beginning: String = reply.chars().take(200).collect();
            return Err((format!("no JSON with a prompt in {beginning:?}"), true));
        };
        let messages = asked(self.case, &prompt);
        self.subject.check(&messages).map_err(|error| (error.to_string(), false))?;
        Ok(Prompt { stream, reply, messages })
    }

    fn answers(&mut self, prompts: &[Prompt]) -> Result<Vec<String>> {
        self.trajectory.cost.answers += prompts.len();
        let conversations: Vec<_> = prompts.iter().map(|prompt| prompt.messages.clone()).collect();
        answers(self.subject.model(), self.subject.format(), &conversations, &self.generation, self.subject.rows())
    }

    fn verdicts(&mut self, answers: &[String]) -> Result<Vec<Verdict>> {
        let case = self.case;
        let answered = answers.iter().map(|answer| Answered {
            behavior: &case.behavior,
            context: case.context.as_deref(),
            target: &case.target,
            answer,
        });
        self.trajectory.cost.replies += answers.len();
        verdicts_of(&mut *self.attack.judge, &answered.collect::<Vec<_>>())
    }

    /// Tells the attacker of an answer, and keeps it.
    fn keep(&mut self, step: usize, prompt: &Prompt, answer: String, verdict: &Verdict) {
        let told = Message::user(feedback(&self.frame.guard(&answer), verdict, self.case));
        let stream = prompt.stream;
        self.streams[stream].exchanges.push((Message::assistant(&prompt.reply), told));
        if score(verdict) > self.best {
            self.best = score(verdict);
            self.trajectory.offered = self.trajectory.attempts.len();
        }
        let messages = prompt.messages.clone();
        self.trajectory.attempts.push(Attempt { step, stream, messages, loss: None, answer });
    }
}

/// The case's conversation with another request in its last message; its context stays.
fn asked(case: &Case, prompt: &str) -> Vec<Message> {
    let mut messages = case.messages.clone();
    if let Some(last) = messages.last_mut() {
        last.content = match &case.context {
            Some(context) => format!("{context}\n\n---\n\n{prompt}"),
            None => prompt.to_string(),
        };
    }
    messages
}
