// Conversations and settings in the browser's storage: a key for each conversation, so that two tabs lose nothing of each
// other's. {id, title, at (ms), messages}. Past LARGEST characters the oldest make room. The API key lives as long as its tab.

const LARGEST = 4_000_000;
const CHAT = "edgewright:chat:", SETTINGS = "edgewright:settings", KEY = "edgewright:key";
export const DEFAULTS = {
  model: "", system: "", temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "", thinking: "", schema: "", tools: "" };

const chatKeys = () => Object.keys(localStorage).filter((name) => name.startsWith(CHAT));

function read(name) {
  try { return JSON.parse(localStorage.getItem(name)); } catch { return null; }
}

/** All conversations, the newest first. */
export function chats() {
  return chatKeys().map(read).filter((chat) => Array.isArray(chat?.messages)).sort((a, b) => b.at - a.at);
}

/** Keep a conversation. Returns the names of older ones that were removed to make room; throws where there is none. */
export function save(chat) {
  const text = JSON.stringify(chat), removed = [];
  const others = () => chats().filter((other) => other.id !== chat.id);
  const drop = () => {
    const oldest = others().at(-1);
    if (!oldest) throw new Error("This conversation is too long to be kept in the browser: export it.");
    localStorage.removeItem(CHAT + oldest.id);
    removed.push(oldest.title);
  };
  const used = () => chatKeys().reduce((sum, name) => sum + (name === CHAT + chat.id ? 0 : localStorage.getItem(name).length), text.length);
  while (used() > LARGEST) drop();
  for (;;) {
    try {
      localStorage.setItem(CHAT + chat.id, text);
      return removed;
    } catch { drop(); }
  }
}

/** {id, chat} of a conversation that another tab has written; chat is null where it is deleted, all is null for anything else. */
export function told({ key, newValue }) {
  return key?.startsWith(CHAT) ? { id: key.slice(CHAT.length), chat: newValue && JSON.parse(newValue) } : null;
}

export const remove = (chat) => localStorage.removeItem(CHAT + chat.id);

export const settings = () => ({ ...DEFAULTS, ...read(SETTINGS) });
export const saveSettings = (values) => localStorage.setItem(SETTINGS, JSON.stringify(values));

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const saveKey = (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY));
