//! What a run reads: rows to train on, and rows that no run trains on.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use advtrain::{
    AnswerPair, BehaviorFiles, Chat, ChatFormat, ChatReader, Example, LoadReport, RandomStrings, Request, RowIndex,
    RunConfig, StringShares, TrainingData, encode_chats, encode_pairs, is_held_out, load_behavior_pairs, load_harmless,
    load_preferences,
};
use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::arguments::GivenFiles;

/// The files of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Files {
    pub requests: Requests,
    pub validation: Option<Requests>,
    /// Of which functional category requests are measured on; all if none is named.
    pub category: Option<String>,
    pub utility: Option<PathBuf>,
    pub harmless: Option<PathBuf>,
    pub harmless_requests: Option<PathBuf>,
    /// The share of rows that is held out where no file of them is named.
    pub held_out: f64,
}

/// Where requests with a harmful and a safe answer come from.
#[derive(Clone, Debug, Serialize)]
pub enum Requests {
    Behaviors { behaviors: PathBuf, targets: PathBuf, refusals: Option<PathBuf> },
    Preferences(PathBuf),
}

/// Rows that no run trains on.
#[derive(Debug)]
pub struct HeldOut {
    pub pairs: Vec<AnswerPair>,
    /// The same rows in the same order, encoded.
    pub rows: Vec<Example>,
    pub chats: Vec<Chat>,
    /// The same chats, encoded.
    pub chat_rows: Vec<Example>,
    /// Harmless requests without answers, on which refusals are counted.
    pub requests: Vec<Request>,
}

/// Everything that is read, and what happened to rows on the way.
#[derive(Debug)]
pub struct Rows {
    pub training: TrainingData,
    pub held_out: HeldOut,
    pub reports: Vec<(String, LoadReport)>,
}

/// Limits of what is measured on, in tokens: nothing is learnt from it, so it need not be short.
const LIMITS: (usize, usize) = (4096, 1024);

impl GivenFiles {
    /// The files, if requests were named.
    pub fn files(self) -> Option<Files> {
        let requests = match (self.behaviors, self.targets, self.preferences) {
            (Some(behaviors), Some(targets), None) => {
                Requests::Behaviors { behaviors, targets, refusals: self.refusals }
            }
            (_, _, Some(preferences)) => Requests::Preferences(preferences),
            _ => return None,
        };
        let validation = match (self.validation_behaviors, self.validation_targets) {
            (Some(behaviors), Some(targets)) => Some(Requests::Behaviors { behaviors, targets, refusals: None }),
            _ => None,
        };
        Some(Files {
            requests,
            validation,
            category: self.category,
            utility: self.utility,
            harmless: self.harmless,
            harmless_requests: self.harmless_requests,
            held_out: self.held_out,
        })
    }
}

/// Reads everything; at most `measured` rows of each set are held out to measure on.
pub fn read(files: &Files, config: &RunConfig, format: &ChatFormat, measured: usize) -> Result<Rows> {
    // The share alone is looked at, once and where its option is known.
    is_held_out("", files.held_out, config.train.seed).context("--held-out")?;
    let strings = match config.data.strings {
        Some(shares) => Some((RandomStrings::new(format.tokenizer(), config.train.seed)?, shares)),
        None => None,
    };
    let mut reader = Reader { config, format, strings: strings.as_ref(), reports: Vec::new() };
    let (mut pairs, held_out_pairs) = reader.pairs(files)?;
    // Trained on alone: what is measured is how an answer begins to the request as it is, whatever was trained.
    for pair in &mut pairs {
        pair.harmful_ends |= config.data.ended_targets;
        if let (Some((strings, shares)), Some(request)) = (&strings, pair.messages.last_mut()) {
            strings.put_behind(shares.harmful, &pair.id, &mut request.content)?;
        }
    }
    let encoded = encode_pairs(format, &pairs, config.data.max_tokens);
    let (robust, report) = match strings {
        Some(_) => encoded.context("with the strings of data.strings, which make rows longer")?,
        None => encoded?,
    };
    reader.report("requests to train on", report);
    let mut chats = reader.chats_to_measure(files, measured)?;
    let requests = files.harmless_requests.as_ref().map(load_harmless).transpose()?.unwrap_or_default();
    let utility = reader.chats_to_train(files, &chats, &requests)?;

    let held_out_pairs = of_category(reader.judged(first_of_each(held_out_pairs)), files.category.as_deref())?;
    let mut pairs = spread(held_out_pairs, measured);
    let mut rows = Vec::new();
    if !pairs.is_empty() {
        let (encoded, report) = encode_pairs(format, &pairs, LIMITS.0)?;
        reader.report("requests to measure on", report);
        rows = encoded;
    }
    let mut chat_rows = reader.encode("chats to measure on", chats.iter().cloned().map(Ok), LIMITS.1)?;
    // Rows of like length are computed together; rows that the template refused are not there.
    rows.sort_by_key(Example::len);
    chat_rows.sort_by_key(Example::len);
    let place = |pair: &AnswerPair| rows.iter().position(|row| row.id() == pair.id);
    pairs.retain(|pair| place(pair).is_some());
    pairs.sort_by_key(place);
    let there: HashSet<&str> = chat_rows.iter().map(Example::id).collect();
    chats.retain(|chat| there.contains(chat.id.as_str()));
    let held_out = HeldOut { pairs, rows, chats, chat_rows, requests: spread(requests, measured) };
    Ok(Rows { training: TrainingData { robust, utility }, held_out, reports: reader.reports })
}

struct Reader<'a> {
    config: &'a RunConfig,
    format: &'a ChatFormat,
    strings: Option<&'a (RandomStrings, StringShares)>,
    reports: Vec<(String, LoadReport)>,
}

impl Reader<'_> {
    fn report(&mut self, what: impl Into<String>, report: LoadReport) {
        let what = what.into();
        eprintln!("{what}: {} rows", report.rows);
        self.reports.push((what, report));
    }

    /// Requests to train on and those that are held out.
    fn pairs(&mut self, files: &Files) -> Result<(Vec<AnswerPair>, Vec<AnswerPair>)> {
        let all = self.load(&files.requests)?;
        let Some(validation) = &files.validation else {
            let mut parts = (Vec::new(), Vec::new());
            for pair in all {
                let held_out = is_held_out(&pair.group, files.held_out, self.config.train.seed)?;
                if held_out { parts.1.push(pair) } else { parts.0.push(pair) }
            }
            refuse_overlap_of_pairs(&parts.0, &parts.1)?;
            return Ok(parts);
        };
        let validation = self.load(validation)?;
        refuse_overlap_of_pairs(&all, &validation)?;
        Ok((all, validation))
    }

    fn load(&mut self, requests: &Requests) -> Result<Vec<AnswerPair>> {
        let (path, (pairs, report)) = match requests {
            Requests::Preferences(path) => (path, load_preferences(path)?),
            Requests::Behaviors { behaviors, targets, refusals } => {
                let files = BehaviorFiles {
                    behaviors: behaviors.clone(),
                    targets: targets.clone(),
                    safe_responses: refusals.clone(),
                };
                (behaviors, load_behavior_pairs(&files)?)
            }
        };
        self.report(path.display().to_string(), report);
        Ok(pairs)
    }

    /// Chats to measure on: of a file of their own, or held out from those to train on.
    fn chats_to_measure(&self, files: &Files, measured: usize) -> Result<Vec<Chat>> {
        let mut chats = Vec::new();
        match (&files.harmless, &files.utility) {
            (Some(path), _) => chats = ChatReader::open(path)?.collect::<advtrain::Result<_>>()?,
            (None, Some(path)) => {
                for chat in ChatReader::open(path)? {
                    let chat = chat?;
                    if is_held_out(&chat.id, files.held_out, self.config.train.seed)? {
                        chats.push(chat);
                    }
                }
            }
            (None, None) => {}
        }
        Ok(spread(chats, measured))
    }

    /// Encoded chats to train on. The file, which may be larger than memory, is read row by row.
    fn chats_to_train(&mut self, files: &Files, chats: &[Chat], requests: &[Request]) -> Result<Vec<Example>> {
        let Some(path) = &files.utility else { return Ok(Vec::new()) };
        if self.config.train.utility_share == 0.0 {
            eprintln!("{}: not trained on, since train.utility_share is 0", path.display());
            return Ok(Vec::new());
        }
        let (seed, own_file, held_out) = (self.config.train.seed, files.harmless.is_some(), files.held_out);
        let stays = |chat: &Chat| own_file || !is_held_out(&chat.id, held_out, seed).unwrap_or(false);
        let asked = requests.iter().map(as_chat);
        let to_measure = RowIndex::of_chats(&chats.iter().cloned().chain(asked).collect::<Vec<_>>());
        let mut trained_on = Vec::new();
        let chats = ChatReader::open(path)?.filter(|chat| chat.as_ref().map_or(true, stays));
        let chats = chats.inspect(|chat| {
            trained_on.extend(chat.as_ref().ok().and_then(|chat| to_measure.find_chat(chat)));
        });
        let strings = self.strings;
        let chats = chats.map(|chat| match strings {
            Some((strings, shares)) => behind_string(chat?, strings, shares.utility),
            None => chat,
        });
        let rows = self.encode("chats to train on", chats, self.config.data.max_tokens)?;
        refuse_overlap("chats and harmless requests to measure on", trained_on.into_iter())?;
        match self.config.data.utility_tokens {
            Some(most) => Ok(rows.into_iter().map(|row| row.first_targets(most)).collect::<advtrain::Result<_>>()?),
            None => Ok(rows),
        }
    }

    fn encode(
        &mut self,
        what: &str,
        chats: impl Iterator<Item = advtrain::Result<Chat>>,
        limit: usize,
    ) -> Result<Vec<Example>> {
        let mut chats = chats.peekable();
        if chats.peek().is_none() {
            return Ok(Vec::new());
        }
        let (rows, report) = encode_chats(self.format, chats, limit, self.config.data.turns)?;
        self.report(what, report);
        Ok(rows)
    }

    /// Without those whose harm a refusal judge cannot tell.
    fn judged(&mut self, pairs: Vec<AnswerPair>) -> Vec<AnswerPair> {
        let (judged, left_out): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|pair| !pair.hash_check);
        if !left_out.is_empty() {
            eprintln!("requests to measure on: {} of copyrighted text left out", left_out.len());
        }
        judged
    }
}

/// A request of a file of them as a chat that holds nothing else.
fn as_chat(request: &Request) -> Chat {
    Chat {
        id: format!("request:{}", request.id),
        place: format!("harmless requests line {}", request.id),
        messages: vec![request.message()],
    }
}

fn behind_string(mut chat: Chat, strings: &RandomStrings, share: f64) -> advtrain::Result<Chat> {
    // The first answer is the one that is learnt whatever is cut off.
    if let Some(first) = chat.messages.iter_mut().find(|message| message.role == "user") {
        strings.put_behind(share, &chat.id, &mut first.content)?;
    }
    Ok(chat)
}

fn refuse_overlap_of_pairs(training: &[AnswerPair], to_measure: &[AnswerPair]) -> Result<()> {
    let to_measure = RowIndex::of_pairs(to_measure);
    refuse_overlap("requests to measure on", training.iter().filter_map(|pair| to_measure.find_pair(pair)))
}

fn refuse_overlap<'a>(what: &str, ids: impl Iterator<Item = &'a str>) -> Result<()> {
    let ids: BTreeSet<&str> = ids.collect();
    match ids.first() {
        Some(first) => bail!("{what}: {} are trained on too, {first} for example", ids.len()),
        None => Ok(()),
    }
}

/// Those of a functional category, if one is named.
fn of_category(pairs: Vec<AnswerPair>, wanted: Option<&str>) -> Result<Vec<AnswerPair>> {
    let Some(wanted) = wanted else { return Ok(pairs) };
    let there: BTreeSet<String> = pairs.iter().filter_map(|pair| pair.functional_category.clone()).collect();
    if !there.contains(wanted) {
        bail!("--category {wanted}: no request to measure on is of that category; there are {there:?}");
    }
    Ok(pairs.into_iter().filter(|pair| pair.functional_category.as_deref() == Some(wanted)).collect())
}

/// One row per behaviour: its first target.
fn first_of_each(pairs: Vec<AnswerPair>) -> Vec<AnswerPair> {
    let mut seen = HashSet::new();
    pairs.into_iter().filter(|pair| seen.insert(pair.group.clone())).collect()
}

/// `most` rows at even distances.
pub fn spread<T>(rows: Vec<T>, most: usize) -> Vec<T> {
    let (all, most) = (rows.len(), most.min(rows.len()));
    let wanted: HashSet<usize> = (0..most).map(|at| at * all / most).collect();
    rows.into_iter().enumerate().filter(|(at, _)| wanted.contains(at)).map(|(_, row)| row).collect()
}

/// The name of a file without its ending.
pub fn stem(path: &Path) -> String {
    path.file_stem().map_or(String::new(), |stem| stem.to_string_lossy().into_owned())
}

/// The folder that a path names, for names of runs.
pub fn folder_name(path: &Path) -> String {
    path.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned())
}
