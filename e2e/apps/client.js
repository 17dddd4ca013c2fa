// A client of one application of server.js, as it comes from npm:
//
//   node client.js APP URL NAMESPACE
//
// It sends numbered messages until SIGTERM, then 50 more, and waits until all that can be
// acknowledged are. It writes lines of JSON to its standard output: {"owner": ...} when
// another backend has answered than before, at last {"result": ...}. A client of one long
// request waits for SIGUSR2 before it begins, and writes {"begun": true} when it is under
// way, {"ended": true} when it is over.
//
// CLIENT_ADDRESS       the IP address of every host. The port is that of the URL
// NODE_EXTRA_CA_CERTS  the certificate to trust
import dns from 'node:dns'
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { HocuspocusProvider } from '@hocuspocus/provider'
import { HttpTransportType, HubConnectionBuilder, LogLevel } from '@microsoft/signalr'
import { createYjsProvider } from '@y-sweet/client'
import { DocumentManager } from '@y-sweet/sdk'
import * as phoenix from 'phoenix'
import { io } from 'socket.io-client'
import WebSocket from 'ws'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'

const [app, base, namespace] = process.argv.slice(2)
const ws = base.replace(/^http/, 'ws')
const segment = encodeURIComponent(namespace)

if (process.env.CLIENT_ADDRESS) {
  dns.lookup = (host, options, done) => {
    const address = process.env.CLIENT_ADDRESS
    const family = address.includes(':') ? 6 : 4
    if (options.all) done(null, [{ address, family }])
    else done(null, address, family)
  }
}
globalThis.WebSocket = WebSocket // Node.js has none before 22

function say(value) {
  console.log(JSON.stringify(value))
}

let owner = ''

function servedBy(backend) {
  if (backend === owner) return
  owner = backend
  say({ owner })
}

let stopped = false
process.on('SIGTERM', () => { stopped = true })

// until waits until a condition holds, or fails after a minute.
async function until(what, holds) {
  for (let i = 0; !holds(); i++) {
    if (i === 6000) throw new Error(`waited a minute until ${what}`)
    await sleep(10)
  }
}

// count sends numbers, until it is asked to stop and 50 more. It returns how many it has
// sent.
async function count(send) {
  let n = 0
  for (let more = 50; more > 0; more -= stopped ? 1 : 0) {
    await send(++n)
    await sleep(20)
  }
  return n
}

// Ledger is what a client knows of its messages: those acknowledged, those that it does
// not know of since the connection ended while they were under way, and the rest.
class Ledger {
  acknowledged = []
  waiting = new Set()
  unknown = []
  connections = 0

  sent(n) { this.waiting.add(n) }

  got(n, backend) {
    this.waiting.delete(n)
    this.acknowledged.push(n)
    servedBy(backend)
  }

  cut(wasSent = () => true) {
    for (const n of [...this.waiting].filter(wasSent)) {
      this.waiting.delete(n)
      this.unknown.push(n)
    }
  }

  result(sent) {
    const { acknowledged, unknown, connections } = this
    return { sent, acknowledged, unknown, waiting: [...this.waiting], connections }
  }
}

// --- documents

// edit has two copies of a document append to the same list, until the client stops, and
// returns both as they are when both sides have all entries.
async function edit(docs) {
  for (const doc of docs) {
    doc.getMap('backends').observe(() => {
      for (const backend of doc.getMap('backends').keys()) {
        if (!served.has(backend)) { served.add(backend); servedBy(backend) }
      }
    })
  }
  const served = new Set()
  await until('a backend has the document open', () => served.size > 0)
  const sent = await count(n => docs.forEach((doc, i) => doc.getArray('list').push([`${i}:${n}`])))
  const list = doc => doc.getArray('list').toArray()
  await until('both sides have all', () => docs.every(doc => list(doc).length >= docs.length * sent))
  await sleep(500) // what comes twice comes now
  return { sent, lists: docs.map(list) }
}

async function yWebsocket() {
  const docs = [new Y.Doc(), new Y.Doc()]
  // disableBc: the two sides are in one program and must not find each other past the server
  const sides = docs.map(doc => new WebsocketProvider(ws + '/ws', namespace, doc, { disableBc: true }))
  const result = await edit(docs)
  sides.forEach(side => side.destroy())
  return result
}

async function hocuspocus() {
  const docs = [new Y.Doc(), new Y.Doc()]
  const sides = docs.map(document => new HocuspocusProvider({ url: `${ws}/collab/${segment}`, name: namespace, document }))
  const result = await edit(docs)
  sides.forEach(side => side.destroy())
  return result
}

async function ySweet() {
  const docs = [new Y.Doc(), new Y.Doc()]
  const manager = new DocumentManager(base.replace(/^http/, 'ys'))
  const sides = docs.map(doc => createYjsProvider(doc, namespace, () => manager.getClientToken(namespace), { showDebuggerLink: false }))
  const result = await edit(docs)
  const copy = new Y.Doc()
  Y.applyUpdate(copy, await manager.getDocAsUpdate(namespace))
  result.lists.push(copy.getArray('list').toArray())
  sides.forEach(side => side.destroy())
  return result
}

// --- messages

async function socketIO(options, url = base) {
  const socket = io(url, options)
  const book = new Ledger()
  const written = new Set() // what was sent, and not kept for the next connection
  const transports = new Set()
  const ticks = []
  socket.io.on('open', () => { // before the first upgrade, which may be faster than 'connect'
    transports.add(socket.io.engine.transport.name)
    socket.io.engine.on('upgrade', transport => transports.add(transport.name))
  })
  socket.on('connect', () => {
    book.connections++
    ticks.push([])
    for (const n of book.waiting) written.add(n)
  })
  socket.on('tick', n => ticks.at(-1).push(n))
  socket.on('disconnect', () => book.cut(n => written.has(n)))
  await until('it is connected', () => socket.connected)
  const sent = await count(n => {
    book.sent(n)
    if (socket.connected) written.add(n)
    socket.emit('message', n, backend => book.got(n, backend))
  })
  await until('all are acknowledged', () => book.waiting.size === 0)
  socket.close()
  return { ...book.result(sent), transports: [...transports], ticks }
}

// readTicks reads the hub's stream, which begins anew with each connection. An error is
// the end of the connection.
function readTicks(hub, ticks) {
  const got = []
  ticks.push(got)
  hub.stream('ticks').subscribe({ next: n => got.push(n), error() {}, complete() {} })
}

async function signalR(transport) {
  const hub = new HubConnectionBuilder()
    .withUrl(`${base}/hub/${segment}`, { transport })
    .withAutomaticReconnect([0, 500, 1000, 1000, 2000, 5000])
    .configureLogging(LogLevel.None)
    .build()
  const book = new Ledger()
  const ticks = []
  hub.onreconnected(() => {
    book.connections++
    readTicks(hub, ticks)
  })
  await hub.start()
  book.connections++
  readTicks(hub, ticks)
  const sent = await count(async n => {
    await until('it is connected', () => hub.state === 'Connected')
    book.sent(n)
    hub.invoke('send', n).then(backend => book.got(n, backend), () => book.cut(lost => lost === n))
  })
  await until('all are acknowledged', () => book.waiting.size === 0)
  await hub.stop()
  return { ...book.result(sent), ticks }
}

async function phoenixSocket(transport) {
  const socket = new phoenix.Socket(`${ws}/socket/${segment}`, { transport, timeout: 8000 })
  const channel = socket.channel('room:1')
  const book = new Ledger()
  socket.onOpen(() => book.connections++)
  socket.connect()
  channel.join()
  await until('it has joined', () => channel.state === 'joined')
  const sent = await count(async n => {
    await until('it has joined', () => channel.state === 'joined' && socket.isConnected())
    book.sent(n)
    channel.push('msg', { n })
      .receive('ok', ({ backend }) => book.got(n, backend))
      .receive('error', () => book.cut(lost => lost === n))
      .receive('timeout', () => book.cut(lost => lost === n))
  })
  await until('all are acknowledged', () => book.waiting.size === 0)
  socket.disconnect()
  return book.result(sent)
}

// --- plain HTTP

const api = `${base}/api/${segment}`

// again does a request until it is answered with success, and returns the answer and how
// often it has failed: an application that can repeat its request does so.
async function again(request) {
  const failures = []
  while (failures.length < 100) {
    try {
      return { ...await request(), failures }
    } catch (err) {
      failures.push(String(err.cause?.message || err.message))
      await sleep(200)
    }
  }
  throw new Error('it has failed too often: ' + failures.at(-1))
}

// get returns the answer to a GET, and throws unless it is 200.
async function get(url, options) {
  const res = await fetch(url, options)
  if (!res.ok) throw new Error(`status ${res.status}: ${await res.text()}`)
  return res
}

// rest asks again and again who answers, one request after the other.
async function rest() {
  const statuses = {}
  const sent = await count(async () => {
    const res = await fetch(api + '/backend')
    statuses[res.status] = (statuses[res.status] || 0) + 1
    const text = await res.text()
    if (res.ok) servedBy(JSON.parse(text).backend)
  })
  return { sent, statuses }
}

const asked = new Promise(resolve => process.on('SIGUSR2', resolve))
setInterval(() => {}, 60000) // a signal that may come does not keep Node.js running

// during does a request that is under way while the namespace moves. It ends when another
// backend answers than before.
async function during(request) {
  const backend = async () => (await (await get(api + '/backend')).json()).backend
  servedBy(await backend())
  const before = owner
  await asked
  const result = await request(() => say({ begun: true }))
  say({ ended: true })
  while (owner === before) servedBy((await again(async () => ({ backend: await backend() }))).backend)
  return result
}

// linesDown reads a stream of lines.
async function linesDown(begun) {
  const res = await get(api + '/lines?count=100&every=80')
  begun()
  let text = ''
  for await (const chunk of res.body.pipeThrough(new TextDecoderStream())) text += chunk
  const lines = text.trim().split('\n').map(line => JSON.parse(line))
  return { sent: 100, acknowledged: lines.map(line => line.n), backends: [...new Set(lines.map(line => line.backend))] }
}

// linesUp writes a stream of lines, and has one answer at its end.
async function linesUp(begun) {
  async function * send() {
    for (let n = 1; n <= 100; n++) {
      yield Buffer.from(JSON.stringify({ n }) + '\n')
      if (n === 10) begun()
      await sleep(80)
    }
  }
  const options = { method: 'POST', body: ReadableStream.from(send()), duplex: 'half' }
  const { backend } = await (await get(api + '/lines', options)).json()
  return { sent: 100, backends: [backend] }
}

const block = Buffer.alloc(1 << 16, 'router')
const blocks = 1600 // 100 MiB

function hashOf(n) {
  const hash = createHash('sha256')
  for (let i = 0; i < n; i++) hash.update(block)
  return hash.digest('hex')
}

// upload sends 100 MiB within the time, in milliseconds, the first time; then at once.
function upload(within) {
  async function * send() {
    const every = within / 100
    within = 0
    for (let n = 0; n < blocks; n++) {
      yield block
      if (n % (blocks / 100) === 0) await sleep(every)
    }
  }
  return async begun => {
    const { got, failures } = await again(async () => {
      if (within) setTimeout(begun, within / 20)
      const options = { method: 'PUT', body: ReadableStream.from(send()), duplex: 'half' }
      return { got: await (await get(api + '/blob', options)).json() }
    })
    if (got.sha256 !== hashOf(blocks)) throw new Error('the backend has got other bytes')
    return { failures, backends: [got.backend], bytes: got.bytes }
  }
}

// download reads 100 MiB, which take the time the first time; then at once.
function download(within) {
  return async begun => {
    const { backend, bytes, failures } = await again(async () => {
      const res = await get(`${api}/blob?blocks=${blocks}&within=${within}`)
      if (within) begun()
      within = 0
      const hash = createHash('sha256')
      let bytes = 0
      for await (const chunk of res.body) {
        hash.update(chunk)
        bytes += chunk.length
      }
      if (hash.digest('hex') !== hashOf(blocks)) throw new Error('the client has got other bytes, and no error')
      return { backend: res.headers.get('x-backend'), bytes }
    })
    return { failures, backends: [backend], bytes }
  }
}

const apps = {
  'y-websocket': yWebsocket,
  hocuspocus,
  'y-sweet': ySweet,
  'socket.io': () => socketIO({ path: '/socket.io/' + segment }),
  'socket.io-polling': () => socketIO({ path: '/socket.io/' + segment, transports: ['polling'] }),
  'socket.io-query': () => socketIO({ query: { doc: namespace } }),
  'socket.io-host': () => socketIO({}, base.replace('//', `//${namespace}.`)),
  signalr: () => signalR(HttpTransportType.WebSockets),
  'signalr-sse': () => signalR(HttpTransportType.ServerSentEvents),
  phoenix: () => phoenixSocket(WebSocket),
  'phoenix-longpoll': () => phoenixSocket(phoenix.LongPoll),
  rest,
  'lines-down': () => during(linesDown),
  'lines-up': () => during(linesUp),
  upload: () => during(upload(8000)),
  download: () => during(download(8000)),
  'upload-cut': () => during(upload(300000)),
  'download-cut': () => during(download(300000))
}

apps[app]().then(
  result => { say({ result }); process.exit(0) },
  err => { console.error(err); process.exit(1) })
