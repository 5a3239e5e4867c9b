"""openai-python in a thread pool, a client a key: the loop that most people write."""

from concurrent.futures import ThreadPoolExecutor

import openai
import peer


def work(told: peer.Told) -> peer.Done:
    clients = [
        openai.OpenAI(
            api_key=key["api_key"],
            base_url=told.base_url,
            max_retries=told.sdk_retries,
            timeout=told.deadline_s,
        )
        for key in told.keys
    ]
    completions = [client.chat.completions for client in clients]
    key_in_turn = told.key_in_turn()
    done = peer.Done()

    def ask(task_id: str, text: str) -> None:
        first = key_in_turn()
        for attempt in range(peer.TRIES):
            chosen = completions[(first + attempt) % len(completions)]
            try:
                reply = chosen.create(model=told.model, messages=told.messages(text))
                done.answers[task_id] = reply.choices[0].message.content
                return
            except openai.OpenAIError as error:
                done.errors[task_id] = type(error).__name__

    with ThreadPoolExecutor(told.in_flight) as pool:
        done.begin()
        list(pool.map(ask, told.tasks.keys(), told.tasks.values()))
        done.end()
    return done


peer.main(work)
