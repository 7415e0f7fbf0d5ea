//! A model's own answers as rows.

#[path = "common/speaking.rs"]
mod speaking;

use advtrain::{Message, Request, answers, self_distilled};
use speaking::{format, generation, model};

fn requests() -> Vec<Request> {
    let request = |(at, text): (usize, &&str)| Request { id: at.to_string(), text: text.to_string(), harmless: true };
    ["Tell me of tea", "Sing", "How do birds fly?"].iter().enumerate().map(request).collect()
}

#[test]
fn rows_are_what_the_model_says() {
    let (model, format, requests) = (model(), format(), requests());
    let found = self_distilled(&model, &format, &requests, "requests.txt", &generation(), 2).unwrap();
    assert!(found.left_out.is_empty());
    assert_eq!(found.chats.len(), 3);
    for (chat, request) in found.chats.iter().zip(&requests) {
        let asked = vec![Message::user(request.text.as_str())];
        let said = answers(&model, &format, &[asked], &generation(), 1).unwrap().remove(0);
        assert_eq!(chat.messages, [Message::user(request.text.as_str()), Message::assistant(said)]);
        assert_eq!((chat.id.as_str(), chat.place.as_str()), (request.id.as_str(), "requests.txt"));
    }
}
