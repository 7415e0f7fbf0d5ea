//! A model's own answers to harmless requests, to keep it as it is.

use super::{answers::answers, refusal::complies};
use crate::{CausalLm, Chat, ChatFormat, Generation, Message, Request, Result};

/// A model's own answers as utility rows.
#[derive(Clone, Debug, Default, PartialEq)]
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
/// If a request cannot be rendered, or the model fails.
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
