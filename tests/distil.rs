//! A model's own answers as rows.

#[path = "common/speaking.rs"]
mod speaking;

use advtrain::{
    Batch, CausalLm, Example, Generation, Message, Request, Sampling, TokenKind, Tokens, answers, drawn_requests,
    self_distilled, tch::Device,
};
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

#[test]
fn drawn_requests_are_what_the_model_writes_for_the_user_up_to_the_end_of_the_turn() {
    let (model, format) = (model(), format());
    let sampling = Some(Sampling { seed: 3, ..Sampling::default() });
    let settings = Generation { max_new_tokens: 40, end_ids: Vec::new(), sampling };
    let draw = |numbers, rows| drawn_requests(&model, &format, numbers, &settings, rows).unwrap();
    let found = draw(0..60, 7);
    assert!((1..60).contains(&found.len()), "of noise some ends in time and some does not: {}", found.len());
    // Its template is cut where the text of the user begins.
    let prompt = format.prompt(&[Message::user("Sing")]).unwrap();
    let text = format.tokenizer().encode("Sing").unwrap();
    let at = prompt.ids().windows(text.len()).position(|ids| ids == text).unwrap();
    let ends = [format.end_ids(), vec![prompt.ids()[at + text.len()]]].concat();
    let settings = Generation { end_ids: ends, ..settings.clone() };
    for request in &found {
        let opening = Tokens::of_kind(prompt.ids()[..at].to_vec(), TokenKind::Template);
        let example = Example::new(&request.id, opening, Vec::new()).unwrap();
        let ids = model.generate(&Batch::new(vec![example], Device::Cpu).unwrap(), None, &settings).unwrap().remove(0);
        assert_eq!(format.tokenizer().decode(&ids[..ids.len() - 1], true).unwrap().trim(), request.text);
        assert!(request.harmless && !request.text.is_empty());
    }
    let parts = [draw(0..20, 4), draw(20..60, 60)].concat();
    assert_eq!(parts, found, "which others are drawn with them changes nothing");
}
