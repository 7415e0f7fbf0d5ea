//! A model's own requests and answers, to keep it as it is.

use std::{collections::HashSet, ops::Range};

use serde::{Deserialize, Serialize};

use super::{answers::answers, refusal::complies};
use crate::{
    Batch, CausalLm, Chat, ChatFormat, Error, Example, Generation, Message, Request, Result, StringPlace, TokenKind,
    Tokens,
};

/// A model's own answers as utility rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SelfDistilled {
    /// A conversation for each request that the model answered.
    pub chats: Vec<Chat>,
    /// The ids of the requests that it refused or said nothing to, which would teach it that.
    pub left_out: Vec<String>,
}

/// Asks a model before its training, `rows` requests at a time, and makes utility rows of its answers: they cost no data
/// set, and training on them moves the model as little as rows can. `place` names where the requests come from.
///
/// Answers that `generation` cuts off are rows too, and end where no answer should. Train on the first
/// `generation.max_new_tokens` tokens at most ([`crate::DataSettings::utility_tokens`]), so that no such end is learnt.
///
/// # Errors
/// If a request cannot be rendered, `rows` is 0, or the model fails.
pub fn self_distilled(
    model: &dyn CausalLm,
    format: &ChatFormat,
    requests: &[Request],
    place: &str,
    generation: &Generation,
    rows: usize,
) -> Result<SelfDistilled> {
    let conversations: Vec<Vec<Message>> = requests.iter().map(|request| vec![request.message()]).collect();
    let said = answers(model, format, &conversations, generation, rows)?;
    Ok(rows_of(requests, said, place))
}

/// Requests that a model writes itself: given its chat template up to where the user speaks, it goes on with what users said
/// in its own training (Magpie, Xu et al. 2024). A text is drawn for each number, `rows` at a time, as `generation` says:
/// which one, its sampling's seed and the number decide. Each ends with the first token that ends a turn or that the template puts behind a
/// user's text; those that do not end, hold no text or come twice are left out.
///
/// A model may write requests that it should refuse. Read them, or draw them from one that is known to write harmless ones.
///
/// # Errors
/// If the template refuses a conversation of one message, `rows` is 0, or the model fails.
pub fn drawn_requests(
    model: &dyn CausalLm,
    format: &ChatFormat,
    numbers: Range<usize>,
    generation: &Generation,
    rows: usize,
) -> Result<Vec<Request>> {
    Error::check_count("rows", rows)?;
    let placed = StringPlace::new(vec![Message::user("")], "")?.encode(format, "Hello")?;
    let opening = Tokens::of_kind(placed.before, TokenKind::Template);
    let mut generation = generation.clone();
    generation.end_ids.extend(format.end_ids().into_iter().chain(placed.behind.first().copied()));
    let mut found = Vec::new();
    let mut known = HashSet::new();
    let numbers: Vec<usize> = numbers.collect();
    for numbers in numbers.chunks(rows) {
        let prompt = |number: &usize| Example::new(format!("drawn/{number}"), opening.clone(), Vec::new());
        let prompts = Batch::new(numbers.iter().map(prompt).collect::<Result<_>>()?, model.device())?;
        for (number, ids) in numbers.iter().zip(model.generate(&prompts, None, &generation)?) {
            let Some((_, text)) = ids.split_last().filter(|(last, _)| generation.end_ids.contains(last)) else {
                continue;
            };
            let text = format.tokenizer().decode(text, true)?.trim().to_string();
            if !text.is_empty() && known.insert(text.clone()) {
                found.push(Request { id: format!("drawn/{number}"), text, harmless: true });
            }
        }
    }
    Ok(found)
}

fn rows_of(requests: &[Request], said: Vec<String>, place: &str) -> SelfDistilled {
    let mut found = SelfDistilled::default();
    for (request, answer) in requests.iter().zip(said) {
        if !complies(&answer) {
            found.left_out.push(request.id.clone());
            continue;
        }
        let messages = vec![request.message(), Message::assistant(answer)];
        found.chats.push(Chat { id: request.id.clone(), place: place.to_string(), messages });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_and_silence_are_no_rows() {
        let request = |id: &str| Request { id: id.into(), text: format!("Do {id}"), harmless: true };
        let said = ["Gladly.", "Sorry, I can't do that.", "  "].map(String::from).to_vec();
        let found = rows_of(&["a", "b", "c"].map(request), said, "f");
        assert_eq!(found.left_out, ["b", "c"]);
        assert_eq!(found.chats.len(), 1);
        assert_eq!(found.chats[0].messages, [Message::user("Do a"), Message::assistant("Gladly.")]);
    }
}
