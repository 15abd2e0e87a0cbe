"""`octavo-operator activator`: takes requests for servers that sleep, wakes them, and passes the requests on.

proxy      one request: refused, held, passed on
bounds     how much may be held                                  (pure)
keys       who may wake a server that asks for API keys          (pure)
answers    what clients are told while nobody else can tell them (pure)
directory  which server a port stands for, and where its engines are: reads the API server
watch      one server while it is asked for: is an engine ready, and what does it do until then
held       for whom requests are held: what the operator asks, and wakes by
serve      the process: ports, signals, the end
"""
