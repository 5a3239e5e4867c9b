"""AsyncOpenAI with a semaphore, a client a key."""

import asyncio

import openai
import peer


async def ask_all(told: peer.Told) -> peer.Done:
    clients = [
        openai.AsyncOpenAI(
            api_key=key["api_key"],
            base_url=told.base_url,
            max_retries=told.sdk_retries,
            timeout=told.deadline_s,
        )
        for key in told.keys
    ]
    completions = [client.chat.completions for client in clients]
    key_in_turn = told.key_in_turn()
    places = asyncio.Semaphore(told.in_flight)
    done = peer.Done()

    async def ask(task_id: str, text: str) -> None:
        async with places:
            first = key_in_turn()
            for attempt in range(peer.TRIES):
                chosen = completions[(first + attempt) % len(completions)]
                try:
                    reply = await chosen.create(model=told.model, messages=told.messages(text))
                    done.answers[task_id] = reply.choices[0].message.content
                    return
                except openai.OpenAIError as error:
                    done.errors[task_id] = type(error).__name__

    done.begin()
    await asyncio.gather(*(ask(task_id, text) for task_id, text in told.tasks.items()))
    done.end()
    return done


peer.main(lambda told: asyncio.run(ask_all(told)))
